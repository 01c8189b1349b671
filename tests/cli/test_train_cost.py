"""What `imagen-jax train` knows of a step's arithmetic."""

import types

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.cli import train
from imagen_jax.config import build
from imagen_jax.models.text_form import zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.training.config import TrainConfig, load_config
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run

# Wide channels: what XLA counts besides, element-wise work, is a small share.
NETWORK = {
    "channels": (128, 256),
    "num_res_blocks": (1, 1),
    "self_attention": (False, True),
    "text_attention": (False, True),
    "text_width": 64,
}
BASE = {"name": "base", "resolution": 32, "max_text_length": 8, "network": {"kind": "unet", **NETWORK}}
SR = {
    "name": "sr",
    "resolution": 128,
    "low_resolution": 32,
    "crop": 64,
    "max_text_length": 8,
    "network": {"kind": "efficient_unet", **NETWORK},
}


def xla_flops(config, side):
    """FLOPs of loss and gradient on one example of that side, as XLA counts the program before it optimises it."""
    run = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    stage, shape = config.stage, jax.ShapeDtypeStruct
    length, width = stage.max_text_length, stage.network.text_width
    batch = {
        "image": shape((1, side, side, 3), jnp.uint8),
        "text": shape((1, length, width), jnp.float32),
        "text_mask": shape((1, length), jnp.bool_),
        "index": shape((1, 2), jnp.uint32),
    }
    if stage.low_resolution:
        low = side // stage.scale
        batch["low_res"] = shape((1, low, low, 3), jnp.uint8)
    null = zero_text(length, width)

    def loss(params, batch):
        return run.losses({DENOISER: params}, batch, null)[DENOISER].loss.mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(run.network.abstract_params, batch)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(("stage", "side"), [(BASE, 32), (SR, 64)], ids=["base", "cropped sr"])
def test_cost_of_a_step_on_a_known_chip(monkeypatch, stage, side):
    values = {"stage": stage, "data": {"path": "unread", "batch_size": 1}, "train": {"steps": 1}}
    config = build(TrainConfig, values, "config")
    expected = xla_flops(config, side)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    cost = train._step_cost(config)
    assert cost.peak_flops == 197e12
    # XLA leaves the padding of the edges out, and nothing asks for the gradient of the pictures themselves.
    assert cost.flops == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("kind", ["cpu", "some new chip"])
def test_no_cost_on_unknown_devices(monkeypatch, kind):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert train._step_cost(load_config("shapes/base16.py")) is None
