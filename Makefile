# Everything runs in an environment of its own, made on first use. Needs Python 3.11 or newer with pip.
PYTHON ?= python3
VENV ?= .venv
PARITY ?= .venv-parity
BEAM ?= .venv-beam
RUN := $(VENV)/bin/python
DEMO ?= demo
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")

.PHONY: help demo drive test slow kernels parity beam lint format environments clean

help:
	@echo "make demo    synthesize a world, convert, collect, train, predict, evaluate, report (into $(DEMO)/)"
	@echo "make drive   let the demo's model and the baselines drive (after make demo; into $(DEMO)/drives/)"
	@echo "make test    run the tests"
	@echo "make slow    run those that take a minute or more: a user's whole day, kills, what a GPU runs"
	@echo "make kernels prove that bits and decisions do not depend on the processor (two minutes)"
	@echo "make parity  compare with transformers' and peft's torch models (installs torch beside, in $(PARITY))"
	@echo "make beam    test the converter on Apache Beam (installed beside, in $(BEAM))"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's formatter, and the drawing of the rooms"
	@echo "make clean   remove $(DEMO)/ and the environments"

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

$(PARITY)/development: requirements-parity.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(PARITY)
	@echo "installing into $(PARITY), a few minutes"
	$(PARITY)/bin/python -m pip install --quiet --requirement requirements-parity.txt
	@touch $@

# Behind the other requirements, not with them: Beam wants an older Pillow.
$(BEAM)/development: requirements-beam.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(BEAM)
	@echo "installing into $(BEAM), a few minutes"
	$(BEAM)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	$(BEAM)/bin/python -m pip install --quiet --requirement requirements-beam.txt
	@touch $@

# What .ci/run needs, to be made side by side: `make --jobs 3 environments`.
environments: $(VENV)/development $(PARITY)/development $(BEAM)/development

# Each step is skipped when its result is there, and a step that was interrupted goes on.
demo: $(DEMO)/run/predictions.jsonl
	$(RUN) -m spacedrive_jax evaluate --predictions $(DEMO)/run/predictions.jsonl --records $(DEMO)/records --split val
	$(RUN) -m spacedrive_jax report $(DEMO)/run

$(DEMO)/nuscenes/v1.0-synthetic/scene.json: | $(VENV)/runtime
	$(RUN) -m data_prep synthesize --out $(DEMO)/nuscenes --scenes 20 --keyframes 20 --image-size 352x198 --workers $(WORKERS)

$(DEMO)/records/provenance.json: $(DEMO)/nuscenes/v1.0-synthetic/scene.json
	$(RUN) -m data_prep convert --dataroot $(DEMO)/nuscenes --version v1.0-synthetic --out $(DEMO)/records --workers $(WORKERS) --resume

# An expert who sways, every drive in towns of its own: the way back to the lane, for `drive`.
$(DEMO)/collected/provenance.json: | $(VENV)/runtime
	$(RUN) -m spacedrive_jax drive --policy expert --perturb --scenarios train --image-size 112x63 --collect $(DEMO)/collected --out $(DEMO)/collected-drives --workers $(WORKERS) --resume

$(DEMO)/run/predictions.jsonl: $(DEMO)/records/provenance.json $(DEMO)/collected/provenance.json
	$(RUN) -m spacedrive_jax train demo --data.records $(DEMO)/records:0.15,$(DEMO)/collected:0.85 --run-dir $(DEMO)/run --resume
	$(RUN) -m spacedrive_jax predict --checkpoint $(DEMO)/run --records $(DEMO)/records --split val --overwrite

# The demo's model against the expert and the blind baselines, in towns that it has not seen.
drive: $(DEMO)/run/predictions.jsonl
	$(RUN) -m spacedrive_jax drive --policy expert --scenarios small --image-size 112x63 --out $(DEMO)/drives/expert --workers $(WORKERS) --resume
	$(RUN) -m spacedrive_jax drive --policy route_constant_speed --scenarios small --image-size 112x63 --out $(DEMO)/drives/route_constant_speed --workers $(WORKERS) --resume
	$(RUN) -m spacedrive_jax drive --policy constant_velocity --scenarios small --image-size 112x63 --out $(DEMO)/drives/constant_velocity --workers $(WORKERS) --resume
	$(RUN) -m spacedrive_jax drive --policy constant_yaw_rate --scenarios small --image-size 112x63 --out $(DEMO)/drives/constant_yaw_rate --workers $(WORKERS) --resume
	$(RUN) -m spacedrive_jax drive --policy standing_still --scenarios small --image-size 112x63 --out $(DEMO)/drives/standing_still --workers $(WORKERS) --resume
	$(RUN) -m spacedrive_jax drive --checkpoint $(DEMO)/run --scenarios small --image-size 112x63 --out $(DEMO)/drives/demo --workers $(WORKERS) --resume --against $(DEMO)/drives/expert $(DEMO)/drives/route_constant_speed $(DEMO)/drives/constant_velocity $(DEMO)/drives/constant_yaw_rate $(DEMO)/drives/standing_still

test: $(VENV)/development
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow"

slow: $(VENV)/development
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 -m slow

kernels: $(VENV)/development
	$(RUN) -m tests.kernels

# Of the tests' flags for a fast compilation none that changes the order of sums.
parity: $(PARITY)/development
	XLA_FLAGS=--xla_backend_optimization_level=0 $(PARITY)/bin/python -m pytest --numprocesses auto --maxprocesses 4 tests/parity

beam: $(BEAM)/development
	$(BEAM)/bin/python -m pytest tests/data_prep/test_beam.py

lint: $(VENV)/development
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/development
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m docs.architecture

clean:
	rm -rf $(DEMO) $(VENV) $(PARITY) $(BEAM)
