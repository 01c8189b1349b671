"""Distributions of the noise levels of training, against their closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from imagen_jax.config import build
from imagen_jax.diffusion.noise_levels import NormalLogSNR, UniformInterval, UniformTime
from imagen_jax.diffusion.schedules import CosineSchedule, LinearSchedule
from imagen_jax.errors import UserError

UNIFORM = jnp.asarray((np.arange(20_000) + 0.5) / 20_000, jnp.float32)


def test_uniform_times_are_what_the_schedule_makes_of_them():
    for schedule in (CosineSchedule(), LinearSchedule()):
        np.testing.assert_array_equal(UniformTime().log_snr(schedule, UNIFORM), schedule.log_snr(UNIFORM))


def test_log_snr_is_normal_between_the_ends_of_the_schedule():
    drawn = np.asarray(NormalLogSNR(mean=2.4, std=2.4).log_snr(CosineSchedule(), UNIFORM), np.float64)
    # The grid's own distance from a continuous distribution is 1 / (2 · 20,000).
    assert stats.kstest(drawn, stats.norm(2.4, 2.4).cdf).statistic < 1e-4
    ends = CosineSchedule(log_snr_min=-1.0, log_snr_max=3.0)
    cut = np.asarray(NormalLogSNR(mean=2.4, std=2.4).log_snr(ends, UNIFORM))
    assert cut.min() == pytest.approx(-1.0, abs=1e-4) and cut.max() == pytest.approx(3.0, abs=1e-4)
    below = stats.norm(2.4, 2.4).cdf(-1.0)
    assert np.mean(cut <= cut.min()) == pytest.approx(below, abs=1e-3)
    # A uniform number may be exactly 0 or 1.
    assert np.isfinite(NormalLogSNR().log_snr(CosineSchedule(), jnp.array([0.0, 1.0]))).all()


def test_an_interval_of_times_has_its_two_ends_and_is_uniform():
    drawn = np.asarray(UniformInterval(time_min=0.25, time_max=0.5).log_snr(CosineSchedule(), UNIFORM))
    # The cosine schedule's time, from its log-SNR.
    times = np.arctan(np.exp(-drawn / 2)) * 2 / np.pi
    assert stats.kstest(times, stats.uniform(0.25, 0.25).cdf).statistic < 2e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "uniform_interval", "time_min": 0.5, "time_max": 0.5}, r"time_min 0\.5 must be below"),
        ({"kind": "normal_log_snr", "std": 0.0}, r"std must be positive, got 0\.0"),
    ],
)
def test_bad_distributions_are_refused(values, message):
    cls = UniformInterval if "interval" in values["kind"] else NormalLogSNR
    with pytest.raises(UserError, match=message):
        build(cls, values, "config.noise_levels")
