# make demo: train and try a small model. make test: everything that CI checks. Both make .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test format

demo: .venv/.for-demo
	$(BIN)/blt demo --out runs/demo

test: .venv/.for-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

format: .venv/.for-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.for-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[plot]'
	touch $@

.venv/.for-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[plot,dev,bench]'
	touch $@ .venv/.for-demo
