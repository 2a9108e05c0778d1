# All commands run from .venv/bin. Not through `uv run`: with it, Ray 2.60 rebuilds the environment in its workers.
PYTHON ?= python3
BIN := .venv/bin
# For bench and bench-full: a folder of photographs, and the weights as of `catsdogs train`.
IMAGES ?= data/cats_and_dogs_filtered
WEIGHTS ?= imagenet
# For faults: the rows whose name contains this; or "planning"; or "cost". Empty: everything.
PART ?=

.PHONY: demo test check format bench bench-full faults
.DELETE_ON_ERROR:

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/catsdogs demo --output runs/demo

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed .venv/peers
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.speed --images $(IMAGES) --weights $(WEIGHTS)

bench-full: .venv/installed .venv/peers
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.speed --images $(IMAGES) --weights $(WEIGHTS) --full

faults: .venv/installed
	$(BIN)/python -m benchmarks.faults --only '$(PART)'

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "catsdogs needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q uv==0.13.9
	$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	touch $@

# Daft without its requirements, which restrict pyarrow to an older version; it works with ours.
.venv/peers: .venv/installed
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps daft==0.7.26
	touch $@
