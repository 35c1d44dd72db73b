# Thin aliases; every line also works by hand in an environment of your own.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-slow test-gpu lint bench

demo: $(VENV)/run
	$(RUN) prepare_data.py shakespeare
	$(RUN) train.py config/demo.py
	$(RUN) sample.py out/demo --prompt="ROMEO." --max_new_tokens=150

test: $(VENV)/dev
	$(RUN) -m pytest -n auto --maxprocesses=4 --dist=worksteal

test-slow: $(VENV)/dev
	$(RUN) -m pip install --quiet --disable-pip-version-check "lm_eval[hf]"
	$(RUN) -m pytest -m "not gpu" -n auto --maxprocesses=4 --dist=worksteal

test-gpu: $(VENV)/dev
	$(RUN) -m pytest tests/test_cuda.py -m gpu -s -rs

lint: $(VENV)/dev
	$(RUN) -m ruff check .

bench: $(VENV)/run
	$(RUN) bench.py

$(VENV)/run: requirements.txt
	@echo "making $(VENV) and installing torch and the rest; the first time this can take minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
