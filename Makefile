# make repro   the whole ladder on real data          make test    the test suite
# make show    the experiments, compared              make check   linters and types
# make schema  params.schema.json from the settings     make pins    requirements.txt from pyproject.toml

SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro announce show test check schema pins

repro: announce .venv/installed
	dvc repro
	@cat results/report/ladder.md

announce:
	@echo "The ladder takes about 13 minutes on two cores with bfloat16 where a float32 step of B=4, T=32 takes 1.3 s,"
	@echo "the installation 1 or 2 more, and 4 GB of memory."
	@echo "Disk: 1.6 GB for packages (several GB more with CUDA's) and 1.6 GB for data. Free here:$$(df -h . | awk 'END {print " " $$4}')."

show: .venv/installed
	@dvc exp show --md --hide-workspace --only-changed --drop '.*(Created|peak_memory|step_ms|loss_first|json$$).*' \
		--sort-by results/trial/metrics.json:tokens_per_second --sort-order desc

test: .venv/installed
	python -m pytest

check: .venv/installed
	ruff check .
	ruff format --check .
	mypy

# For editors: params.yaml names it in its first line.
schema: .venv/installed
	PYTHONPATH=src python -c 'import json; from gpt2_ladder.config import Params; \
		print(json.dumps(Params.model_json_schema(), indent=2))' > params.schema.json

# The CPU wheel and the CUDA wheel of torch share one version number, so the local part (+cpu) is cut off.
pins: .venv/installed
	python -m pip install --quiet pip-tools
	pip-compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
		--output-file requirements.txt pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.txt

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed; try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --requirement requirements.txt
	touch $@
