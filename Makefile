# make run   set up and do the main job: three attentions trained side by side on real scanned digits
# make test  set up, then lint, types and tests
# make docs  set up, then the documentation site in build/site
# make wheel wheels for Linux in dist, with the C++ kernel compiled: for this machine, and for aarch64 where its
#            cross compiler is (Debian: g++-aarch64-linux-gnu)
# The first three create .venv when it is missing and install again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.karat-installed

# Two test processes on two cores, one thread each: threads that fight for a core are slower than none.
JOBS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

MACHINES := $(shell uname -m) $(if $(shell command -v aarch64-linux-gnu-g++),aarch64)

.PHONY: run test docs wheel install lint format clean
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/karat compare softmax g3b g3u --data digits --output runs/digits --overwrite

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/tables.py
	$(BIN)/zensical build --strict --clean

wheel: $(STAMP)
	for machine in $(sort $(MACHINES)); do KARAT_WHEEL=$$machine $(BIN)/python -m build --wheel || exit 1; done

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,explore]"
	touch $@

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
