# Two commands on a fresh machine: `make quickstart` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
# setuptools warns about editable installs of any package beside its setup.py.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

.PHONY: quickstart test test-parity test-kill lint clean

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-test
	$(PIP) --editable '.[parity]'
	touch $@

quickstart: $(VENV)/.installed  ## install, train a small cascade on embedded data, draw and score pictures
	JAX_PLATFORMS=cpu $(BIN)/imagen-jax quickstart --out=$(OUT)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## style, types and all tests but those below
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest

test-parity: $(VENV)/.installed-parity  ## networks against transformers and diffusers on PyTorch
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m parity

test-kill: $(VENV)/.installed-test  ## jobs killed and restarted many times
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m kill

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
