"""Error of the deterministic samplers against their number of steps, and against the exact flow."""

import numpy as np
import pytest

from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.loop import image_noise
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule

STEPS = (16, 32, 64, 128)
COUNT = 256


@pytest.fixture(scope="module")
def exact(plane, keys_of):
    """exact(level): where the flow takes the samplers' first noise from that level; float64, error 1e-8."""
    x_1 = np.asarray(image_noise(keys_of(COUNT), 0, plane.shape), np.float64)
    return lambda log_snr: plane.flow(x_1, log_snr, 400)


@pytest.mark.parametrize(
    ("kind", "grid", "order", "finest"),
    [
        (Sampler.DDIM, Grid.TIME, (0.85, 1.15), 0.01),
        (Sampler.HEUN, Grid.TIME, (1.75, 2.25), 5e-4),
        (Sampler.HEUN, Grid.LOG_SNR, (1.8, 2.25), 2e-3),
        (Sampler.DPMPP, Grid.LOG_SNR, (1.8, 2.2), 1e-3),
        (Sampler.DPMPP_3M, Grid.LOG_SNR, (2.6, 3.3), 1e-4),
        # The last step, of first order, is longest on this grid, and steps near it differ in length.
        (Sampler.DPMPP, Grid.TIME, (1.5, 2.0), 1e-3),
    ],
)
def test_order(plane, draw, exact, kind, grid, order, finest):
    errors = []
    for steps in STEPS:
        config = SamplerConfig(kind=kind, steps=steps, grid=GridConfig(kind=grid))
        made = draw(plane, CosineSchedule(), config, COUNT)
        expected = exact(float(config.log_snrs(CosineSchedule())[0]))
        errors.append(np.sqrt(np.mean((made - expected) ** 2)))
    slope = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert order[0] < slope < order[1], (slope, errors)
    assert errors[-1] < finest


@pytest.mark.parametrize("kind", [Sampler.DDIM, Sampler.DPMPP, Sampler.HEUN])
def test_a_schedule_that_begins_without_signal(plane, draw, exact, kind):
    schedule = CosineSchedule(log_snr_min=-200.0)
    made = draw(plane, schedule, SamplerConfig(kind=kind, steps=64, grid=GridConfig()), COUNT)
    assert np.sqrt(np.mean((made - exact(-200.0)) ** 2)) < (0.02 if kind is Sampler.DDIM else 5e-3)
