# Two commands on a fresh machine: `make demo` and `make test`. Both set up the environment they need first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= demo_output
# Tests run side by side, each with one thread: several threads in several processes would wait for each other.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

.PHONY: demo test test-long test-fast lint install clean

demo: $(VENV)/.runtime
	$(BIN)/nnUNetv2_oneshot_demo -o $(DEMO_OUTPUT) --overwrite

test: $(VENV)/.dev lint
	$(PYTEST) -m "not long"

test-long: $(VENV)/.dev
	$(PYTEST) -m long

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not real"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.dev

# Editable, so that what runs is this checkout, also after it changes.
# SAM2_BUILD_CUDA=0: sam2's optional CUDA extension only fills holes in masks, and its build needs a CUDA compiler.
$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
