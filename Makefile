# `make demo` and `make test` set themselves up in .venv; everything else is for convenience.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_DIR ?= runs/demo
CONFIGS := bundles/pgl_pretrain/configs

.PHONY: install demo test lint format benchmarks clean

install: $(VENV)/.installed

# torch first and pinned: other packages would pull a newest build with gigabytes of CUDA.
$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install
	$(RUN) -m pgl_ext phantom $(DEMO_DIR)/phantoms --cases 12
	rm -rf $(DEMO_DIR)/pretrain
	$(RUN) -m monai.bundle run training --config_file "['$(CONFIGS)/train.json','$(CONFIGS)/small.yaml']" \
		--data_list_file_path $(DEMO_DIR)/phantoms/dataset.json --output_dir $(DEMO_DIR)/pretrain
	@echo "Done: encoder, metrics.csv, metrics.png, views.png and TensorBoard logs are in $(abspath $(DEMO_DIR)/pretrain)"

test: install
	$(RUN) -m pytest

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

benchmarks: install
	for script in benchmarks/aligner.py benchmarks/views.py benchmarks/volume_cache.py benchmarks/alignment_error.py benchmarks/training_step.py; do \
		$(RUN) $$script || exit 1; done

clean:
	rm -rf $(VENV) runs
