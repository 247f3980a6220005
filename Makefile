# make demo | test | lint | types | wheel | bench | format | clean: in .venv, made on first use.
# make gpu: in the current environment, without a network.
.ONESHELL:
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
GPU_MARKERS ?= gpu or gpu2 or gpu4 or gpu8
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

.PHONY: venv demo test lint types wheel gpu bench format clean

# Without --no-compile pip compiles all of torch and transformers, of which little is imported.
venv: $(STAMP)

$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: venv
	$(BIN)/python -m cosmos3_fast demo --out out

test: venv
	$(BIN)/python -m coverage erase
	$(BIN)/pytest --cov --cov-report=term

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: venv
	$(BIN)/mypy

# The wheel is built from the sdist, so that a file missing there is found out.
wheel: venv
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .

gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	pytest -m '$(GPU_MARKERS)'
	pytest bench

bench: venv
	$(BIN)/pytest bench

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist out *.egg-info cosmos3_fast/_C*.so .coverage .coverage.* .mypy_cache \
		.pytest_cache .ruff_cache
