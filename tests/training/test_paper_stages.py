"""The paper's stages: their size, and that a step of each runs on a mesh and is compiled once."""

import jax
import numpy as np
import pytest

from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import check_batch_size, make_mesh
from imagen_jax.training.batches import device_batch
from imagen_jax.training.config import load_config
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import make_train_step

STAGES = ("base64", "sr256", "sr1024")


@pytest.mark.parametrize(
    ("spec", "least", "most"),
    [
        ("base64.py", 2.0e9, 2.3e9),  # arXiv 2205.11487, section 3.1: 2 B, 600 M and 400 M
        ("sr256.py", 0.55e9, 0.65e9),
        ("sr1024.py", 0.38e9, 0.48e9),
        ("base64.py:small", 0.2e9, 0.23e9),
        ("sr256.py:small", 0.055e9, 0.065e9),
        ("sr1024.py:small", 0.038e9, 0.05e9),
    ],
)
def test_parameters(spec, least, most):
    assert least <= StageNetwork(load_config(f"imagen/{spec}").stage).parameter_count() <= most


def batch_of(config, step):
    """What the input pipeline gives for a step."""
    stage, generator = config.stage, np.random.default_rng(step)
    count, side = config.data.batch_size, stage.crop or stage.resolution
    batch = {
        "image": generator.integers(0, 256, (count, side, side, 3), np.uint8),
        "text": generator.standard_normal(
            (count, stage.max_text_length, stage.network.text_width), np.float32
        ),
        "text_mask": np.arange(stage.max_text_length) < generator.integers(1, 9, (count, 1)),
        "index": np.arange(step * count, (step + 1) * count),
    }
    if stage.low_resolution:
        low = side * stage.low_resolution // stage.resolution
        batch["low_res"] = generator.integers(0, 256, (count, low, low, 3), np.uint8)
    return batch


def state_of(run):
    """A state in the place of a run's first; `run.init` would take most of the time to compile."""
    generator = np.random.default_rng(0)
    abstract = run.abstract
    params = jax.tree.map(
        lambda leaf: jax.device_put(0.1 * generator.standard_normal(leaf.shape, np.float32), leaf.sharding),
        abstract.params,
    )
    rest = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract
    )
    return rest._replace(params=params, ema=jax.tree.map(jax.numpy.copy, params))


@pytest.mark.parametrize("stage", STAGES)
def test_debug_variant_steps_on_eight_devices_and_is_compiled_once(stage, optimizations, mixed_dtypes):
    full, config = load_config(f"imagen/{stage}.py"), load_config(f"imagen/{stage}.py:debug")
    for field in (
        "KIND",
        "dtype",
        "remat",
        "gather",
        "attention",
        "patch_size",
    ):  # the same way through the code
        assert getattr(config.stage.network, field) == getattr(full.stage.network, field), field
    assert config.optimizer == full.optimizer and config.loss == full.loss
    mesh = make_mesh(config.mesh)
    assert mesh.shape["fsdp"] == 8
    check_batch_size(config.data.batch_size, mesh, "batch_size")
    run = Run.of(config, mesh)
    state = state_of(run)
    before = {name: np.asarray(value) for name, value in state.params[DENOISER].items()}
    train_step = make_train_step(run)
    null = zero_text(config.stage.max_text_length, config.stage.network.text_width)
    compiled: list[str] = []
    losses = []
    for step in range(20):
        batch = device_batch(batch_of(config, step), mesh)
        if step == 1:
            jax.monitoring.register_event_duration_secs_listener(
                lambda event, *_, **__: "backend_compile" in event and compiled.append(event)
            )
        state, metrics = train_step(state, batch, null)
        losses.append(float(metrics["loss"]))
    assert compiled == []
    assert int(state.step) == 20 and np.isfinite(losses).all()
    moved = [
        name for name, value in before.items() if not np.array_equal(value, state.params[DENOISER][name])
    ]
    assert len(moved) > 0.9 * len(before)
    kernel = state.params[DENOISER][
        "up.0.stack.blocks.0.conv1.kernel" if stage == "sr1024" else "conv_in.kernel"
    ]
    assert kernel.dtype == np.float32
