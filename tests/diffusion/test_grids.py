"""Grids against their formulas in float64."""

import numpy as np
import pytest

from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule

STEPS = 9


def levels(schedule=None, steps=STEPS, **fields):
    return np.asarray(GridConfig(**fields).log_snrs(schedule or CosineSchedule(), steps), np.float64)


def test_time():
    times = 1 - np.arange(1, STEPS) / STEPS
    expected = -2 * np.log(np.tan(np.pi / 2 * times))
    made = levels()
    np.testing.assert_allclose(made[0], -15.0, atol=1e-3)
    np.testing.assert_allclose(made[1:], expected, atol=0.01)  # the schedule's bounds move the angle by 6e-4


def test_log_snr_takes_the_noisier_end_of_equal_parts():
    np.testing.assert_allclose(levels(kind=Grid.LOG_SNR), -12 + 24 * np.arange(9) / 9, atol=1e-4)
    # The schedule's own ends where they are narrower.
    made = levels(CosineSchedule(log_snr_min=-8.0, log_snr_max=4.0, shift=-1.0), kind=Grid.LOG_SNR)
    np.testing.assert_allclose(made, -9 + 12 * np.arange(9) / 9, atol=1e-3)
    end = -np.log(np.expm1(10.05))  # of the linear schedule, log-SNR at t = 1
    np.testing.assert_allclose(levels(LinearSchedule(), kind=Grid.LOG_SNR)[0], end, atol=1e-4)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_is_equation_5(rho):
    """σ_i = (σ_max^(1/ρ) + i/(N−1)·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ with EDM's ends 80 and 0.002."""
    i = np.arange(STEPS)
    sigma = (80 ** (1 / rho) + i / (STEPS - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    ends = {"log_snr_min": -2 * np.log(80), "log_snr_max": -2 * np.log(0.002)}
    made = np.exp(-levels(kind=Grid.KARRAS, rho=rho, **ends) / 2)
    np.testing.assert_allclose(made, sigma, rtol=1e-3 if rho == 7 else 2e-2)


@pytest.mark.parametrize("kind", [Grid.TIME, Grid.LOG_SNR, Grid.KARRAS])
@pytest.mark.parametrize("steps", [1, 2, 500])
def test_begins_at_noise_and_rises_even_without_terminal_signal(kind, steps):
    made = levels(CosineSchedule(log_snr_min=-200.0), steps=steps, kind=kind)
    assert len(made) == steps and np.all(np.isfinite(made)) and np.all(np.diff(made) > 0)
    np.testing.assert_allclose(made[0], -200.0 if kind is Grid.TIME else -12.0, atol=1e-3)


def test_own_grids():
    own = {Sampler.DDIM: Grid.TIME, Sampler.DPMPP: Grid.LOG_SNR, Sampler.HEUN: Grid.KARRAS}
    for kind, grid in own.items():
        made = SamplerConfig(kind=kind, steps=STEPS).log_snrs(CosineSchedule())
        np.testing.assert_array_equal(made, levels(kind=grid).astype(np.float32))
        other = SamplerConfig(kind=kind, steps=STEPS, grid=GridConfig(kind=Grid.KARRAS, rho=3.0))
        np.testing.assert_array_equal(
            other.log_snrs(CosineSchedule()), levels(kind=Grid.KARRAS, rho=3.0).astype(np.float32)
        )


@pytest.mark.parametrize("fields", [{"rho": 0.5}, {"log_snr_min": 12.0}, {"log_snr_max": -12.0}])
def test_bad_configs(fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        GridConfig(**fields)
