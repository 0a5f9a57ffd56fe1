# `make train`, `make tasks` and `make test` are all that a fresh machine needs; they create .venv.
PYTHON ?= python3
export PATH ?= /usr/local/bin:/usr/bin:/bin
BIN := .venv/bin

.PHONY: train tasks test test-compile check clean
.DELETE_ON_ERROR:

train: .venv/.train
	$(BIN)/python experiments/train_byte_lm.py $(ARGS)

tasks: .venv/.train
	$(BIN)/python experiments/expressivity.py quick $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The kernels compiled for GPUs that need not be there; JAX for it is PYTHON=python3.12's or later.
test-compile: .venv/.train .venv/.cuda13
	$(BIN)/python -m benchmarks.compiled_kernels --check $(ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv

# Each marker records that one extra of pyproject.toml is installed.
.venv/.train .venv/.test .venv/.dev .venv/.cuda13: .venv/.%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else \
	    f"e88_jax needs Python 3.11 to 3.13, but $(PYTHON) is {v[0]}.{v[1]}: pass PYTHON=python3.12, say.")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
