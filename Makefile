# `make demo` and `make test` set themselves up in .venv; everything else is for convenience.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
PGL := $(VENV)/bin/pgl
LABEL_VENV := .venv-label
DEMO_DIR ?= runs/demo
.PHONY: install label-environment demo test fuzz test-label test-slurm lint format docs benchmarks package clean

install: $(VENV)/.installed

# What the commands need, in the tested versions. torch first and by itself: other packages would pull another version.
$(VENV)/.commands: requirements.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' requirements.txt)
	$(PIP) --constraint requirements.txt --editable .
	touch $@

# And what tests, exports and further formats need.
$(VENV)/.installed: $(VENV)/.commands
	$(PIP) -r requirements.txt
	touch $@

label-environment: $(LABEL_VENV)/.installed

$(LABEL_VENV)/.installed: requirements-label.txt
	test -x $(LABEL_VENV)/bin/python || $(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|wheel)==' $<)
	$(LABEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r $<
	touch $@

# The whole way on phantoms: pre-train, see whether it helps three labelled cases, segment new scans. One seed is no verdict.
demo: $(VENV)/.commands
	$(PGL) phantom $(DEMO_DIR)/scans --cases 12 --seed 1
	$(PGL) phantom $(DEMO_DIR)/data --cases 12 --test_cases 4
	rm -rf $(DEMO_DIR)/pretrained $(DEMO_DIR)/gain $(DEMO_DIR)/segmented
	$(PGL) pretrain $(DEMO_DIR)/scans $(DEMO_DIR)/pretrained --spacing "[6, 6, 6]" --max_epochs 6
	$(PGL) gain $(DEMO_DIR)/data $(DEMO_DIR)/gain --pretrained $(DEMO_DIR)/pretrained --seeds 1 --labelled_cases 3 \
		--max_epochs 3
	$(PGL) segment $(DEMO_DIR)/gain $(DEMO_DIR)/data/dataset.json $(DEMO_DIR)/segmented
	@echo "Done: open $(abspath $(DEMO_DIR)/gain/report.html), and the pictures in $(abspath $(DEMO_DIR)/segmented)"

test: install
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Headers of scans, mutated and compared with other readers; repeat a run with its MUTANTS and SEED.
MUTANTS ?= 5000
SEED ?= $(shell date +%s)
fuzz: install
	PGL_FUZZ_MUTANTS=$(MUTANTS) PGL_FUZZ_SEED=$(SEED) $(RUN) -m pytest tests/transforms/test_fuzz.py

# A session with a MONAI Label server on this machine.
test-label: install label-environment
	$(RUN) -m pytest -m label

# Jobs of a SLURM of this machine alone; tests/tools/slurm.sh says what that needs.
test-slurm: install
	$(RUN) -m pytest -m slurm

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

docs: install
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(RUN) -m mkdocs build --strict

benchmarks: install
	for script in aligner views volume_cache alignment_error training_step exports sliding_window verdict; do \
		$(RUN) benchmarks/$$script.py || exit 1; done

package: install
	$(PGL) package --out dist

clean:
	rm -rf $(VENV) $(LABEL_VENV) runs
