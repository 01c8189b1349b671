"""Every config file builds, in all its variants, a network whose parameters have shapes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.training.batches import pipeline_config
from imagen_jax.training.config import load_config
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.glob("*/*.py") if path.name != "__init__.py")


def load(spec):
    """The config; those for anybody's pictures leave the text's width to their records."""
    unset = spec.startswith("pictures/")
    return load_config(spec, ["--config.stage.network.text_width=96"] if unset else [])


def variants(path):
    """The variants that the config's docstring names: Variants:  "" (full), "smoke" (…)."""
    text = re.search(r"^Variants?:(.*?)(?:\n\n|\n[A-Z]\w*:|\"\"\"\n)", path.read_text(), re.M | re.S)
    return re.findall(r'"(\w*)"', text.group(1)) if text else [""]


SPECS = [f"{path.relative_to(CONFIGS)}:{variant}" for path in FILES for variant in variants(path)]


def test_there_are_configs():
    assert {"shapes/base16.py:", "shapes/base16.py:smoke", "shapes/sr64.py:", "shapes/sr64.py:smoke"} <= set(
        SPECS
    )


# Other sizes or losses of a network of the same file: traced, each would take as long as the first.
ALIKE = ("v_prediction", "small", "l", "m")


@pytest.mark.parametrize("spec", SPECS)
def test_config_builds(spec):
    config = load(spec)
    pipeline_config(config)
    assert StageNetwork(config.stage).parameter_count() > 10_000


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.partition(":")[2] not in ALIKE])
def test_loss_has_a_shape(spec):
    config = load(spec)
    network, stage = StageNetwork(config.stage), config.stage
    initial = jax.eval_shape(network.init, jax.random.key(0))
    assert {name: (each.shape, each.dtype) for name, each in initial.items()} == {
        name: (each.shape, jnp.float32) for name, each in network.abstract_params.items()
    }
    side, count = stage.crop or stage.resolution, 2
    shapes = {
        "image": ((count, side, side, 3), jnp.uint8),
        "text": ((count, stage.max_text_length, stage.network.text_width), jnp.bfloat16),
        "text_mask": ((count, stage.max_text_length), jnp.bool_),
        "index": ((count, 2), jnp.uint32),
    }
    if stage.low_resolution:
        low = side * stage.low_resolution // stage.resolution
        shapes["low_res"] = ((count, low, low, 3), jnp.uint8)
    batch = {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}
    run = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    null = zero_text(stage.max_text_length, stage.network.text_width)
    losses = jax.eval_shape(run.losses, {DENOISER: initial}, batch, null)[DENOISER]
    assert (losses.loss.shape, losses.loss.dtype) == ((count,), jnp.float32)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_says_how_it_is_run(path):
    name = str(path.relative_to(CONFIGS))
    assert f"imagen-jax train --config={name}" in path.read_text()
