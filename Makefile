# make test   new machine -> .venv -> lint, types, tests        make demo   render and score a few clips
# make lint   ruff + mypy                                       make bench  the hot paths, timed
# make test-slow   the shipped models' numbers, measured again
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test test-slow lint format demo bench clean

test: lint
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo --out runs/demo

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.world
	$(BIN)/python -m benchmarks.rewards

# Torch comes first and pinned, so that no other package's range picks its version and build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,eval,viz,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
