# `make demo` and `make test` set themselves up in .venv; everything else is for convenience.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
LABEL_VENV := .venv-label
DEMO_DIR ?= runs/demo
PRETRAIN := bundles/pgl_pretrain/configs
SEGMENT := bundles/pgl_segmentation/configs
FINE_TUNE = $(RUN) -m monai.bundle run training \
	--config_file "['$(SEGMENT)/train.json','$(SEGMENT)/tasks/phantom.yaml','$(SEGMENT)/small.yaml']" \
	--spacing "[5, 5, 5]" --data_list_file_path $(DEMO_DIR)/data/dataset.json --labelled_cases 3 \
	--patches_per_case 32 --max_epochs 24 --val_interval 6

.PHONY: install label-environment demo test test-label lint format docs benchmarks package clean

install: $(VENV)/.installed

# torch first and by itself: other packages would pull another version.
$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

label-environment: $(LABEL_VENV)/.installed

$(LABEL_VENV)/.installed: requirements-label.txt
	test -x $(LABEL_VENV)/bin/python || $(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|wheel)==' $<)
	$(LABEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r $<
	touch $@

# The whole way on phantoms: pre-train, fine-tune on three labelled cases from random weights and from the encoder,
# evaluate both on held-out cases, compare, report.
demo: install
	$(RUN) -m pgl_ext phantom $(DEMO_DIR)/data --cases 12 --test_cases 4
	rm -rf $(DEMO_DIR)/pretraining $(DEMO_DIR)/random $(DEMO_DIR)/pgl $(DEMO_DIR)/comparison
	$(RUN) -m monai.bundle run training \
		--config_file "['$(PRETRAIN)/train.json','$(PRETRAIN)/small.yaml']" --spacing "[5, 5, 5]" --max_epochs 16 \
		--data_list_file_path $(DEMO_DIR)/data/dataset.json --output_dir $(DEMO_DIR)/pretraining
	$(FINE_TUNE) --output_dir $(DEMO_DIR)/random
	$(FINE_TUNE) --output_dir $(DEMO_DIR)/pgl --pretrained_encoder $(DEMO_DIR)/pretraining/models/pgl_encoder.pt
	for run in random pgl; do \
		$(RUN) -m monai.bundle run evaluating --config_file $(SEGMENT)/evaluate.json \
			--model_path $(DEMO_DIR)/$$run/models/model.pt --data_list_file_path $(DEMO_DIR)/data/dataset.json \
			--data_list_key test --output_dir $(DEMO_DIR)/$$run/evaluation || exit 1; done
	$(RUN) -m pgl_ext compare $(DEMO_DIR)/random/evaluation $(DEMO_DIR)/pgl/evaluation --names random,PGL \
		--out $(DEMO_DIR)/comparison
	$(RUN) -m pgl_ext report $(DEMO_DIR)/report.html --runs random=$(DEMO_DIR)/random,PGL=$(DEMO_DIR)/pgl \
		--pretraining $(DEMO_DIR)/pretraining --comparison $(DEMO_DIR)/comparison --title "Three labelled phantoms" \
		--note "Phantom CTs show that everything works; they say nothing about patients."
	@echo "Done: open $(abspath $(DEMO_DIR)/report.html)"

test: install
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A session with a MONAI Label server on this machine.
test-label: install label-environment
	$(RUN) -m pytest -m label

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
	$(RUN) -m pgl_ext package --out dist

clean:
	rm -rf $(VENV) $(LABEL_VENV) runs
