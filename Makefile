# make repro   the whole ladder on real data          make test    the test suite
# make check   linters and types                      make pins    requirements.txt anew from pyproject.toml

SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro test check pins

repro: .venv/installed
	@echo "The ladder takes about 12 minutes on two cores where a B=4, T=32 float32 step takes 1.3 s, and 2 GB of disk"
	@echo "besides the 2 GB of the virtual environment. Free here: $$(df -h --output=avail . | tail -n 1)."
	dvc repro
	@cat results/report/ladder.md

test: .venv/installed
	python -m pytest

check: .venv/installed
	ruff check .
	ruff format --check .
	mypy

# The CPU wheel and the CUDA wheel of torch share one version number, so the local part (+cpu) is cut off.
pins: .venv/installed
	python -m pip install --quiet pip-tools
	pip-compile --quiet --upgrade --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
		--output-file requirements.txt pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.txt

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed; try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --requirement requirements.txt
	touch $@
