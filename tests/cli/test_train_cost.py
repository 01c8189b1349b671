"""What `imagen-jax train` knows of a step's arithmetic."""

import types

import jax
import pytest

from imagen_jax.cli import train
from imagen_jax.training.config import load_config


def test_cost_of_a_step_on_a_known_chip(monkeypatch):
    """The small base stage's convolutions alone are a lower bound, counted by hand for its first level."""
    config = load_config("shapes/base16.py")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    cost = train._step_cost(config)
    assert cost.peak_flops == 197e12
    # Down block and two up blocks of 32 channels at 16×16, two 3×3 convolutions each, forward and twice backward.
    assert cost.flops > 3 * 2 * 16 * 16 * 9 * (2 * 32 * 32 + (64 + 32) * 32 + (96 + 32 + 32) * 32)
    config_cropped = load_config("imagen/sr1024.py:debug")
    assert train._step_cost(config_cropped).flops < 1e12


@pytest.mark.parametrize("kind", ["cpu", "some new chip"])
def test_no_cost_on_unknown_devices(monkeypatch, kind):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert train._step_cost(load_config("shapes/base16.py")) is None
