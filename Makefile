# make repro   the whole ladder on real data          make test    the test suite
# make benchmark  the gains again, in 30 rounds        make plots   DVC's plots as a page that needs no network
# make show    the experiments, compared              make check   linters and types
# make plan    will it fit, how fast could it be       make test-gpu  what a first GPU run has to show
# make hellaswag  how often it finds the right ending   make sample  let the trial's network write
# make share FOLDER=../my-gpt2   for the Hugging Face hub    make docs    docs/levels from prose, src/ and results/
# make schema  params.schema.json from the settings     make pins    requirements.txt from pyproject.toml

SHELL := /bin/bash
PYTHON ?= python3
ROUNDS ?= 30
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# DVC needs a user name; in a container a user id may have none
export USER := $(or $(USER),$(shell id -un 2> /dev/null),$(shell id -u))
# Recipes read these from the environment, as they were typed: make would expand a $ in them, the shell a quote.
# Only OPTIONS is split into words by the shell.
$(foreach name,$(filter ROUNDS MEMORY MODEL LIMIT FOLDER PROMPT OPTIONS,$(.VARIABLES)), \
	$(eval override $(name) := $$(value $(name)))$(eval export $(name)))

.PHONY: repro announce benchmark show plots plan hellaswag sample share test test-fast test-gpu check docs schema pins

repro: announce .venv/installed
	dvc repro
	@cat results/report/ladder.md

announce:
	@echo "The ladder takes about 20 minutes on two cores with bfloat16 where a float32 step of B=4, T=32 takes 1.1 s,"
	@echo "the installation 1 or 2 of them, and 10 GB of memory."
	@echo "Disk: 1.6 GB for packages (several GB more with CUDA's) and 1.6 GB for data. Free here:$$(df -h . | awk 'END {print " " $$4}')."

# The longer measurement becomes the stage's result: `dvc repro` keeps it until something that it depends on changes.
benchmark: .venv/installed
	dvc repro parity
	PYTHONPATH=src python -m pipeline.benchmark --rounds "$$ROUNDS"
	dvc commit --force benchmark
	dvc repro report
	@cat results/report/ladder.md

show: .venv/installed
	@dvc exp show --md --hide-workspace --only-changed --drop '.*(Created|bits_per_byte|peak_memory|step_ms|loss_first|gains|over_|tflops|mfu|control|json$$).*' \
		--sort-by results/trial/metrics.json:tokens_per_second --sort-order desc

# DVC's own page loads Vega from a server and is blank without one; vl-convert has it on the disk.
plots: .venv/installed
	@mkdir -p .dvc/tmp
	@python -c 'import vl_convert; print("<!doctype html><meta charset=utf-8><title>gpt2-ladder</title><script>" \
		+ vl_convert.javascript_bundle() + "</script>{plot_divs}")' > .dvc/tmp/plots.html
	dvc plots show --html-template .dvc/tmp/plots.html

test: .venv/installed
	python -m pytest

# The inner loop: without the tests of the whole pipeline, of killed processes, and of the GPU tests' rehearsal
test-fast: .venv/installed
	python -m pytest -m "not gpu and not long and not slow"

# What this machine's GPU shows, in a few minutes, and gpu-report.md: please send it back
test-gpu: .venv/installed
	python -m pytest -m gpu -n 0 tests/test_gpu.py

# Will it fit? Of this machine, or of a GPU that is not here: make plan MEMORY=24GiB
plan: .venv/installed
	@dvc repro pipeline/environment-stage/dvc.yaml:environment > /dev/null
	@PYTHONPATH=src python -m pipeline.tools.plan $${MEMORY+--memory="$$MEMORY"}

# 10,042 questions, over an hour on two cores: make hellaswag LIMIT=500, or MODEL=models/trial for the trial's network
hellaswag: .venv/installed
	@dvc repro pipeline/environment-stage/dvc.yaml:environment download > /dev/null
	@PYTHONPATH=src python -m pipeline.tools.hellaswag $${MODEL+"$$MODEL"} $${LIMIT+--limit="$$LIMIT"}

# The trial's network, or MODEL's, as a folder for the Hugging Face hub; TRIM=1 leaves out the rows that pad its vocabulary
share: .venv/installed
	@PYTHONPATH=src python -m pipeline.tools.share $(if $(TRIM),--trim) "$(if $(FOLDER),,$(error name a new folder: make share FOLDER=../my-gpt2))$$FOLDER" $${MODEL+"$$MODEL"}

# A text that begins with the prompt: make sample PROMPT="Once upon a time" OPTIONS="--hub openai-community/gpt2 --length 50"
sample: .venv/installed
	@dvc repro pipeline/environment-stage/dvc.yaml:environment download > /dev/null
	@PYTHONPATH=src python -m pipeline.tools.sample --prompt="$$PROMPT" $(OPTIONS)

check: .venv/installed
	ruff check .
	ruff format --check .
	mypy

# What the report stage writes as well; for a change of prose or code that changes no result.
docs: .venv/installed
	PYTHONPATH=src python -m pipeline.levels

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
