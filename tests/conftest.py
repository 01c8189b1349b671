"""Eight fake CPU devices and strict promotion for every test, and the small things that several of them train on."""

import functools
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Read when JAX first makes its devices, which no import of the package does.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["IMAGEN_JAX_CACHE"] = "off"  # tests leave nothing in the user's cache folder
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Compiling takes most of the time of tests with tiny networks: LLVM's optimizations cost more than they save. (But
# without them bfloat16 is ten times as slow: the fixture `optimizations` turns them on.)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

ROOT = Path(__file__).parents[1]
# Files that take minutes, begun first: `make test` shares files between two processes, which then end together.
LONG = (
    *(
        "training/test_processes.py",
        "test_quickstart.py",
        "training/test_resume.py",
        "notebooks/test_notebooks.py",
    ),
    *("training/test_paper_stages.py", "text/test_processes.py", "training/test_checkpoint.py"),
    *(
        "training/test_online.py",
        "training/test_health.py",
        "plan/test_libtpu.py",
        "models/test_execution.py",
    ),
)
TEXT_WIDTH = 16
RECORDS = 96  # of the split "train"; "test" has 8

# Real networks of both kinds, attention and text included, that compile in seconds. A width of 64 makes
# kernels large enough to be split over a mesh.
CONFIG = """
def get_config(variant="base"):
    if variant not in ("base", "sr"):
        raise ValueError(f"tiny.py has the variants 'base' and 'sr', not {variant!r}")
    sr = variant == "sr"
    stage = {
        "name": variant,
        "resolution": 16 if sr else 8,
        "low_resolution": 8 if sr else None,
        "max_text_length": 6,
        "network": {
            "kind": "efficient_unet" if sr else "unet",
            "channels": [8],
            "num_res_blocks": [1],
            "self_attention": [True],
            "text_attention": [True],
            "head_channels": 8,
            "embedding_width": 64,
            "text_width": 16,
        },
        "prediction": "v",
        "sampling": {"sampler": {"steps": 2}},
    }
    return {
        "stage": stage,
        "loss": {"space": "v"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "data": {"path": RECORDS, "batch_size": 8, "num_threads": 2},
        "train": {"steps": 4, "ema_decay": 0.99, "log_every": 1, "checkpoint_every": 2, "sample_every": 0},
    }
"""


def pytest_configure(config: pytest.Config) -> None:
    # A plugin may have imported JAX before this file: then the variable comes too late.
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers have the folder from here
        # A program is compiled once for all tests, their processes and the commands that they start.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="imagen_jax_tests_")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    _be_strict()


def _be_strict() -> None:
    """Arrays of two ranks or dtypes that meet are an error, but where other libraries let them meet on purpose."""
    import jax
    import optax
    from flax import nnx

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")

    def lenient(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"):
                return function(*args, **kwargs)

        return call

    chain = optax.chain

    def lenient_chain(*parts):
        whole = chain(*parts)
        return optax.GradientTransformationExtraArgs(whole.init, lenient(whole.update))

    jax.nn.dot_product_attention = lenient(jax.nn.dot_product_attention)
    nnx.LayerNorm.__call__ = lenient(nnx.LayerNorm.__call__)
    optax.chain = lenient_chain


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("JAX_COMPILATION_CACHE_DIR"), ignore_errors=True)


@pytest.fixture
def optimizations():
    """Programs of the test are compiled as a user's are."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def mixed_dtypes():
    """Dtypes are promoted as for a user: JAX's gradient of its attention in bfloat16 does so on purpose."""
    import jax

    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """Folder of a small text encoder of width TEXT_WIDTH."""
    from imagen_jax.data import shapes_captions
    from imagen_jax.text.small import make_small_encoder

    folder = tmp_path_factory.mktemp("encoder") / "text_encoder"
    make_small_encoder(folder, vocabulary_texts=shapes_captions.words(), width=TEXT_WIDTH, layers=1)
    return folder


@pytest.fixture(scope="session")
def records_folder(tmp_path_factory, text_encoder):
    """Records of the embedded data at 16×16, splits "train" (two shards) and "test"."""
    from imagen_jax.text.precompute import PrecomputeConfig, precompute

    out = tmp_path_factory.mktemp("data") / "records"
    for split, count, shards in (("train", RECORDS, 2), ("test", 8, 1)):
        precompute(
            PrecomputeConfig(
                source=f"shapes:count={count},resolution=16",
                text_encoder=str(text_encoder),
                out=str(out),
                split=split,
                num_shards=shards,
            )
        )
    return out


@pytest.fixture(scope="session")
def config_file(tmp_path_factory, records_folder):
    """A config file with the variants "base" (8×8) and "sr" (8×8 → 16×16)."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(f"RECORDS = {str(records_folder)!r}\n{CONFIG}")
    return path


@pytest.fixture(scope="session")
def make_config(config_file):
    """make_config(variant, "field=value", …) → TrainConfig."""
    from imagen_jax.training.config import load_config

    def make(variant="base", *overrides):
        return load_config(f"{config_file}:{variant}", [f"--config.{each}" for each in overrides])

    return make


@pytest.fixture(scope="session")
def subprocess_env():
    """subprocess_env(devices) → the environment of a command on that many fake devices."""

    def make(devices=1):
        flags = f"--xla_force_host_platform_device_count={devices}"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}

    return make


def pytest_collection_modifyitems(items):
    places = {str(ROOT / "tests" / name): place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


@pytest.fixture(scope="session")
def random_params():
    """random_params(stage) → parameters of which none is zero."""
    from imagen_jax.models.stage import StageNetwork

    def make(stage):
        generator = np.random.default_rng(0)
        params = {}
        for name, leaf in StageNetwork(stage).abstract_params.items():
            draw = generator.standard_normal(leaf.shape).astype(np.float32)
            if name.endswith("kernel"):
                params[name] = draw * math.prod(leaf.shape[:-1]) ** -0.5
            else:
                params[name] = name.endswith("scale") + np.float32(0.2) * draw
        return params

    return make
