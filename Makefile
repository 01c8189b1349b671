# Two commands on a fresh machine: `make quickstart` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
# With an accelerator: make quickstart PLATFORM=cuda JAX='jax[cuda13]', or PLATFORM=tpu JAX='jax[tpu]'.
PLATFORM ?= cpu
JAX ?= jax
DEMO ?= runs/demo
# setuptools warns about editable installs of any package beside its setup.py.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

NEWEST_PYTHON ?= python3.12
COLAB_PYTHON ?= python3.13
# Such a machine is taken to have JAX, Flax, Optax, Orbax, transformers and PyTorch, with what those need.
WHEELS := grain ml-collections tensorflow-datasets diffusers etils array-record jaxtyping wadler-lindig google-crc32c \
    tensorboardX tensorflow-metadata simple-parsing docstring-parser immutabledict toml dm-tree absl-py \
    googleapis-common-protos protobuf sentencepiece importlib-resources importlib-metadata portpicker psutil \
    zipp cloudpickle termcolor wrapt
WHEELS_OF_SOURCE := promise
SUITE := -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: quickstart demo-model demo-base demo-sr test test-parity test-browser test-cloud test-kill test-readme test-colab test-launch test-oldest test-newest wheels docs lint clean

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable . '$(JAX)'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test,docs,plan]'
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-test
	$(PIP) --editable '.[parity]'
	touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-test
	$(PIP) --editable '.[serve,browser]'
	touch $@

$(VENV)/.installed-cloud: $(VENV)/.installed-test
	$(PIP) --editable '.[gcs,s3,cloud-test]'
	touch $@

# The arrays of a step are kept and not given back to the system: a tenth of a step's time on a CPU.
quickstart demo-base demo-sr: export MALLOC_MMAP_THRESHOLD_ = 4000000000
quickstart demo-base demo-sr: export MALLOC_TRIM_THRESHOLD_ = 8000000000
quickstart: $(VENV)/.installed  ## install, train a small cascade on embedded data, draw and score pictures
	JAX_PLATFORMS=$(PLATFORM) $(BIN)/imagen-jax quickstart --out=$(OUT)

# The model in the box, from nothing: hours on 2 cores, minutes on an accelerator; a stopped run goes on.
DEMO_WORLD := shapes:world=rich,language=both
DEMO_SOURCE := $(DEMO_WORLD),jitter=wide,captions=short,resolution=64
DEMO_TRAIN := $(BIN)/imagen-jax train --config.data.path=$(DEMO)/records
# Two trainings side by side, a core for either, are nearly twice as fast as one on two cores after the other.
ifeq ($(PLATFORM)-$(shell command -v taskset >/dev/null && echo yes),cpu-yes)
DEMO_JOBS := --jobs=2
demo-base: DEMO_TRAIN := taskset --cpu-list 0 $(DEMO_TRAIN)
demo-sr: DEMO_TRAIN := taskset --cpu-list 1 $(DEMO_TRAIN)
endif
# The text encoder learns from pictures without wide jitter: what it has to learn, which is beside which, shows sooner.
demo-model: $(VENV)/.installed  ## trains, exports and scores what --model=demo is
	$(BIN)/imagen-jax precompute --source=$(DEMO_SOURCE),count=120000 --text_encoder=$(DEMO)/text_encoder \
	    --make_small_encoder --pretrain_on=$(DEMO_WORLD),resolution=32,siblings=yes,count=400000 \
	    --out=$(DEMO)/records --split=train
	$(BIN)/imagen-jax precompute --source=$(DEMO_SOURCE),count=2000 --text_encoder=$(DEMO)/text_encoder \
	    --out=$(DEMO)/records --split=test
	$(BIN)/imagen-jax precompute --source=$(DEMO_SOURCE),objects=2,count=70000 --text_encoder=$(DEMO)/text_encoder \
	    --out=$(DEMO)/pairs --split=train
	$(BIN)/imagen-jax precompute --source=$(DEMO_SOURCE),objects=2,count=2000 --text_encoder=$(DEMO)/text_encoder \
	    --out=$(DEMO)/pairs --split=test
	$(MAKE) $(DEMO_JOBS) demo-base demo-sr
	$(BIN)/imagen-jax export --from=$(DEMO)/base,$(DEMO)/sr --out=$(DEMO)/model --dtype=int8
	$(BIN)/python benchmarks/demo_scores.py --model=$(DEMO)/model --out=$(DEMO)/scores

demo-base:
	$(DEMO_TRAIN) --config=demo/base16.py --workdir=$(DEMO)/base-first
	$(DEMO_TRAIN) --config=demo/base16.py:pairs --workdir=$(DEMO)/base-pairs --init_from=$(DEMO)/base-first \
	    --config.data.path=$(DEMO)/pairs
	$(DEMO_TRAIN) --config=demo/base16.py:further --workdir=$(DEMO)/base --init_from=$(DEMO)/base-pairs

demo-sr:
	$(DEMO_TRAIN) --config=demo/sr64.py --workdir=$(DEMO)/sr-first
	$(DEMO_TRAIN) --config=demo/sr64.py:further --workdir=$(DEMO)/sr --init_from=$(DEMO)/sr-first

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## style, types and all tests but those below
	JAX_PLATFORMS=cpu $(BIN)/python $(SUITE)

test-parity: $(VENV)/.installed-parity  ## networks against transformers and diffusers on PyTorch
	JAX_PLATFORMS=cpu $(BIN)/python $(SUITE) -m parity

test-browser: $(VENV)/.installed-browser  ## the page in the system's Chromium, which is installed where it may be
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m browser

test-cloud: $(VENV)/.installed-cloud  ## whole runs on emulated object stores, gs:// and s3://
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m cloud

test-kill: $(VENV)/.installed-test  ## jobs killed and restarted many times
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m kill

test-readme: $(VENV)/.installed-test  ## the commands of README, one after the other, in an empty folder
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m readme

# COLAB_FREEZE: pip-freeze.txt of the repository googlecolab/backend-info.
test-colab: $(VENV)/.installed-test  ## the notebooks in Colab's versions, from the installation on
	COLAB_FREEZE=$(COLAB_FREEZE) COLAB_PYTHON=$(COLAB_PYTHON) JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m colab

# xpk pins versions that do not go with ours: it gets an environment of its own.
$(VENV)-xpk/.installed:
	$(PYTHON) -m venv $(VENV)-xpk
	$(VENV)-xpk/bin/python -m pip install --quiet 'xpk>=1.16,<2'
	touch $@

test-launch: $(VENV)/.installed-test $(VENV)-xpk/.installed  ## the GKE launcher's command, parsed by xpk itself
	XPK_PYTHON=$(abspath $(VENV)-xpk/bin/python) JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m xpk

# uv finds the lowest releases that the bounds in setup.py allow.
$(VENV)-oldest/.installed: setup.py
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(abspath $(VENV)-oldest) $(VENV)-oldest/bin/uv pip install --quiet --resolution=lowest-direct \
	    --editable '.[test,docs,plan]'
	touch $@

test-oldest: $(VENV)-oldest/.installed  ## the suite at the lower bounds of setup.py
	JAX_PLATFORMS=cpu $(VENV)-oldest/bin/python $(SUITE)

$(VENV)-newest/.installed: setup.py
	$(NEWEST_PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy=eager --editable '.[test,docs,plan]'
	touch $@

test-newest: $(VENV)-newest/.installed  ## the suite on a newer Python with the newest releases
	JAX_PLATFORMS=cpu $(VENV)-newest/bin/python $(SUITE)

docs: $(VENV)/.installed-test  ## the documentation as a site in site/
	$(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html'

wheels: $(VENV)/.installed  ## what a GPU machine without network lacks for benchmarks/gpu.sh, as files in wheels/
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest=wheels $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir=wheels $(WHEELS_OF_SOURCE)
	du -ch wheels/*.whl

clean:
	rm -rf $(VENV) $(VENV)-xpk $(VENV)-oldest $(VENV)-newest build site wheels *.egg-info .pytest_cache .mypy_cache .ruff_cache
