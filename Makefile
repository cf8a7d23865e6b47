# make repro      run the whole ladder                  make test       run all tests
# make benchmark  measure the gains in 30 rounds         make test-fast  run the tests that take seconds
# make try        train and measure one change           make test-gpu   check a GPU
# make show       compare the experiments                make check      run linters and the type checker
# make plots      write DVC's plots to a page            make schema     write params.schema.json
# make plan       predict memory and least time          make pins       write requirements.txt
# make sample     write text with the trial's network    make share      make a folder for the Hugging Face hub
# make hellaswag  grade a network on HellaSwag           make write      train a network that writes, in ten minutes
# make check-mine MINE=my_gpt.py:GPT   check whether your own network is GPT-2, and race it
# make benchmark PROCESSES=5   measure the gains in five fresh processes, one after the other
# make docs       write the numbers of machines/ into README.md and docs/
# make quality    train the quality levels with 10 seeds, to see which losses differ by more than chance
# make gpu MINUTES=20   run all that a first climb on a GPU shows, as far as it fits into this time
# With TORCH=installed, all of these use the torch that came with the machine instead of the pinned one.

SHELL := /bin/bash
PYTHON ?= python3
ifdef PROCESSES
ROUNDS ?= 6
endif
ROUNDS ?= 30
SEEDS ?= 10
MINUTES ?= 20
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# DVC needs a user name, and a user id in a container may not have one
export USER := $(or $(USER),$(shell id -un 2> /dev/null),$(shell id -u))
# A file that adds the packages of PYTHON to .venv, so that later calls without TORCH keep its torch
INSTALLED_TORCH := $(wildcard .venv/lib/python3.*/site-packages/installed_torch.pth)
TORCH ?= $(if $(INSTALLED_TORCH),installed)
# Recipes read these variables from the environment, exactly as typed: make would expand a $, the shell a quote.
# Only OPTIONS is split into words by the shell.
$(foreach name,$(filter CHANGE MINE ROUNDS PROCESSES SEEDS MINUTES MEMORY MODEL LIMIT FOLDER PROMPT OPTIONS,$(.VARIABLES)), \
	$(eval override $(name) := $$(value $(name)))$(eval export $(name)))

.PHONY: repro try write announce benchmark quality show plots plan hellaswag sample share check-mine test test-fast test-gpu gpu check schema pins docs

repro: announce .venv/installed
	dvc repro
	@cat results/report/ladder.md
	@echo && cat results/report/summary.txt

# make try CHANGE="precision=bf16 compile=true". DVC's last lines are about files, so the result is printed again
try: .venv/installed
	@read -ra changes <<< "$(if $(CHANGE),,$(error CHANGE is not set; run make try CHANGE="precision=bf16"))$$CHANGE" \
		&& dvc exp run "$${changes[@]/#/--set-param=}"
	@echo
	@git for-each-ref --sort=-committerdate --count=1 --format='Experiment: %(refname:lstrip=4)' 'refs/exps/??/*/*'
	@cat results/report/summary.txt

# Trains on tiny Shakespeare, then writes. make write CHANGE="recipe.minutes=60" changes or adds settings.
WRITE := recipe.model=small recipe.minutes=10 recipe.batch_size=8 recipe.block_size=64 recipe.shuffle=true \
	recipe.learning_rate=4e-3 recipe.schedule=cosine recipe.lr_warmup_steps=50 recipe.clip_norm=1.0 \
	recipe.decay=matrices recipe.betas=[0.9,0.95] recipe.weight_decay=0.1 recipe.eval_every=200 fused_adamw=true \
	allocator=caching checkpoint_every=200 trial.cpu.seconds=0 trial.gpu.seconds=0
write: .venv/installed
	@read -ra changes <<< "$(WRITE) $$CHANGE" && dvc exp run "$${changes[@]/#/--set-param=}" trial \
		|| { echo "If you stopped it, the same command continues after the last checkpoint."; exit 1; }
	@PYTHONPATH=src python -m pipeline.tools.sample --length 300 --temperature 0.8 --top-k 40 --prompt="$$PROMPT"

announce:
	@echo "Takes about 20 minutes on two cores, 10 GB of memory and 3 GB of disk (several GB more with CUDA's packages)."
	@echo "Free disk space here:$$(df -h . | awk 'END {print " " $$4}'). Safe to interrupt: make repro continues."

# With PROCESSES=5, in five fresh processes, one after the other.
# Saves the longer measurement as the result of the stage. `dvc repro` keeps it until a dependency changes.
benchmark: .venv/installed
	dvc repro parity
	PYTHONPATH=src python -m pipeline.benchmark --rounds "$$ROUNDS" $${PROCESSES+--processes "$$PROCESSES"}
	dvc commit --force benchmark
	dvc repro report
	@cat results/report/ladder.md

# Trains the quality levels once more for each seed after the first. If you stop it, the same command continues.
quality: .venv/installed
	dvc repro parity
	PYTHONPATH=src:. python -m experiments.quality --seeds "$$SEEDS"

# DVC cannot sort by the gain before a trial has one; `make write`, for example, measures none
SHOW = dvc exp show --md --hide-workspace --only-changed \
	--drop '.*(Created|bits_per_byte|peak_memory|step_ms|loss_first|gains|over_|tflops|mfu|control|seconds|(json|csv)$$).*'
show: .venv/installed
	@$(SHOW) --sort-by gain --sort-order desc 2> /dev/null || $(SHOW)

# DVC's default page loads Vega from a server. This page includes Vega, from vl-convert.
plots: .venv/installed
	@mkdir -p .dvc/tmp
	@python -c 'import vl_convert; print("<!doctype html><meta charset=utf-8><title>gpt2-ladder</title><script>" \
		+ vl_convert.javascript_bundle() + "</script>{plot_divs}")' > .dvc/tmp/plots.html
	dvc plots show --html-template .dvc/tmp/plots.html

test: .venv/installed
	python -m pytest

# Does not run the whole pipeline, kill processes, or rehearse the GPU tests
test-fast: .venv/installed
	python -m pytest -m "not gpu and not long and not slow"

# Takes a few minutes and writes gpu-report.md: please send it to us
test-gpu: .venv/installed
	python -m pytest -m gpu -n 0 tests/test_gpu.py

gpu: .venv/installed
	@PYTHONPATH=src python -m pipeline.tools.gpu "$$MINUTES"

# For this machine, or for another GPU: make plan MEMORY=24GiB
plan: .venv/installed
	@dvc repro pipeline/environment-stage/dvc.yaml:environment > /dev/null
	@PYTHONPATH=src python -m pipeline.tools.plan $${MEMORY+--memory="$$MEMORY"}

# All 10,042 questions take over an hour on two cores: try LIMIT=500. MODEL=models/trial grades the trial's network
hellaswag: .venv/installed
	@dvc repro pipeline/environment-stage/dvc.yaml:environment download > /dev/null
	@PYTHONPATH=src python -m pipeline.tools.hellaswag $${MODEL+"$$MODEL"} $${LIMIT+--limit="$$LIMIT"}

# make share FOLDER=../my-gpt2. MODEL=folder shares another network, TRIM=1 removes the rows that pad the vocabulary
share: .venv/installed
	@PYTHONPATH=src python -m pipeline.tools.share $(if $(TRIM),--trim) "$(if $(FOLDER),,$(error FOLDER is not set; run make share FOLDER=../my-gpt2))$$FOLDER" $${MODEL+"$$MODEL"}

# make check-mine MINE=my_gpt.py:GPT OPTIONS="--precision bf16 --compile"
check-mine: .venv/installed
	@PYTHONPATH=src python -m pipeline.tools.check "$(if $(MINE),,$(error MINE is not set; run make check-mine MINE=my_gpt.py:GPT))$$MINE" $(OPTIONS)

# make sample PROMPT="Once upon a time" OPTIONS="--hub openai-community/gpt2 --length 50"
sample: .venv/installed
	@dvc repro pipeline/environment-stage/dvc.yaml:environment download > /dev/null
	@PYTHONPATH=src python -m pipeline.tools.sample --prompt="$$PROMPT" $(OPTIONS)

check: .venv/installed
	ruff check .
	ruff format --check .
	mypy

# Replaces only what is between two markers of a page.
docs: .venv/installed
	PYTHONPATH=src:. python -m experiments.machines

# Editors check params.yaml with this schema.
schema: .venv/installed
	PYTHONPATH=src python -c 'import json; from gpt2_ladder.params import Params; \
		print(json.dumps(Params.model_json_schema(), indent=2))' > params.schema.json

# Removes the suffix +cpu from torch's version, because the pins are also for its CUDA wheel.
pins: .venv/installed
	python -m pip install --quiet pip-tools
	pip-compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
		--output-file requirements.txt pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.txt

.venv/installed: requirements.txt $(if $(TORCH),$(if $(INSTALLED_TORCH),,new))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed; try make PYTHON=python3.11"; exit 1; }
ifeq ($(TORCH),)
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --requirement requirements.txt
else
# Without pip, because some notebooks lack the package that installs it: pip comes from PYTHON, too. PYTHON may be in
# another environment, whose packages --system-site-packages would not find.
	@[ "$(TORCH)" = installed ] || { echo "error: TORCH=$(TORCH): the only value is installed"; exit 1; }
	@own="$(CURDIR)/.venv/bin:" && export PATH="$${PATH//"$$own"}" && folders=$$($(PYTHON) -E -c 'import importlib.metadata, site; \
		assert [*map(int, importlib.metadata.version("torch").split(".")[:2])] >= [2, 9]; print(*site.getsitepackages(), sep="\n")' 2> /dev/null) \
		|| { echo "error: TORCH=installed, but $(PYTHON) has no torch 2.9 or newer: set PYTHON to one that has, or leave TORCH out"; exit 1; } \
		&& $(PYTHON) -m venv --clear --without-pip --system-site-packages .venv \
		&& echo "$$folders" > "$$(echo .venv/lib/python3.*/site-packages)/installed_torch.pth"
	grep -v '^torch==' requirements.txt | python -m pip install --quiet --ignore-installed --no-deps --requirement /dev/stdin
endif
	touch $@
.PHONY: new
