# Everything a fresh machine needs: `make train` and `make test` install what they use, then run it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install train test test-grid check format bench sheet clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(READY) ## make the virtual environment (VENV=path, default .venv) and install the pinned packages

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(READY) ## train and evaluate the default model: CPU, no network, a few minutes
	$(BIN)/python train.py

test: $(READY) ## run the whole test suite
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-grid: $(READY) ## every encoder x connector x LLM x tiling (the suite runs a sample): tens of minutes
	PYTHONPATH=. $(BIN)/python tests/grid.py

check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## apply the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## training throughput beside transformers' Trainer and a bare loop
	$(BIN)/python benchmarks/train_throughput.py

sheet: $(READY) ## draw the contact sheet of the made-up world into docs/scenes.png
	$(BIN)/python -m vlm_lab.data.scenes.sheet docs/scenes.png

clean: ## remove caches and outputs, keep the virtual environment
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
