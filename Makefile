# make demo: train five models on associative recall, print the table, write runs/demo/report.html
# make test: every fast test     make check: lint, types, import contracts     make check-all: the slow checks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU build of torch where the package index offers one at this version; the range in pyproject.toml admits it.
TORCH ?= torch==2.13.0

.PHONY: demo test check check-all clean

demo: $(VENV)/.installed
	$(BIN)/zoo train mqar-demo out=runs/demo
	$(BIN)/zoo compare runs/demo --report runs/demo/report.html

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Peers are read as files, never as dependencies: no package of theirs is installed beside ours.
check-all: $(VENV)/.installed-dev $(VENV)/.peers
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m pytest -m "slow and not gpu" -rs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a later step then finds it satisfied and fetches no other build.
$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.peers: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/peers flash-linear-attention fla-core
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
