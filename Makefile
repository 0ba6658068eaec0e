# Everything runs in an environment of its own, made on first use. Needs Python 3.11 or newer with pip.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEMO ?= demo
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")

.PHONY: help demo test lint format clean

help:
	@echo "make demo    synthesize a world, convert, train, predict, evaluate, report (into $(DEMO)/)"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's formatter"
	@echo "make clean   remove $(DEMO)/ and the environment"

$(VENV)/runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a minute or two"
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/development: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a minute or two"
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@ $(VENV)/runtime

demo: $(VENV)/runtime
	$(RUN) -m data_prep synthesize --out $(DEMO)/nuscenes --scenes 16 --keyframes 20 --image-size 352x198 --workers $(WORKERS)
	$(RUN) -m data_prep convert --dataroot $(DEMO)/nuscenes --version v1.0-synthetic --out $(DEMO)/records --workers $(WORKERS)
	$(RUN) -m spacedrive_jax train demo --data.records $(DEMO)/records --run-dir $(DEMO)/run
	$(RUN) -m spacedrive_jax predict --checkpoint $(DEMO)/run --records $(DEMO)/records --split val
	$(RUN) -m spacedrive_jax evaluate --predictions $(DEMO)/run/predictions.jsonl --records $(DEMO)/records --split val
	$(RUN) -m spacedrive_jax report $(DEMO)/run

test: $(VENV)/development
	$(RUN) -m pytest

lint: $(VENV)/development
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/development
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(DEMO) $(VENV)
