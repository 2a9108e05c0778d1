# All commands run from .venv/bin. Not through `uv run`: with it, Ray 2.60 rebuilds the environment in its workers.
PYTHON ?= python3
BIN := .venv/bin
# For bench and bench-full: a folder of photographs, and the weights as of `catsdogs train`.
IMAGES ?= data/cats_and_dogs_filtered
WEIGHTS ?= imagenet
# For faults: the rows whose name contains this; or "planning"; or "cost". For bench-scale: a check. Empty: everything.
PART ?=

.PHONY: demo test check format bench bench-full bench-scale faults
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

bench-scale: .venv/installed
	$(BIN)/python -m benchmarks.scale $(if $(PART),--only $(PART))

faults: .venv/installed
	$(BIN)/python -m benchmarks.faults --only '$(PART)'

# Each package must have a hash of its lock file. `uv pip compile --universal --generate-hashes` writes these files.
.venv/installed: pyproject.toml requirements.lock requirements-uv.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "catsdogs needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

# Without their requirements: Daft's restrict pyarrow to an older version, it works with ours; OpenVINO's send telemetry.
.venv/peers: .venv/installed benchmarks/requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --require-hashes -r benchmarks/requirements.lock
	touch $@
