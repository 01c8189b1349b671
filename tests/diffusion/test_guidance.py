"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.guidance import GuidanceConfig, guide, rescale_guided
from imagen_jax.diffusion.process import Prediction, convert

GENERATOR = np.random.default_rng(0)
CONDITIONAL, UNCONDITIONAL, X_T = (
    jnp.asarray(GENERATOR.standard_normal((3, 4, 4, 3)), jnp.float32) for _ in range(3)
)


def test_weights():
    np.testing.assert_array_equal(guide(CONDITIONAL, UNCONDITIONAL, 1.0), CONDITIONAL)
    np.testing.assert_array_equal(guide(CONDITIONAL, UNCONDITIONAL, 0.0), UNCONDITIONAL)
    # Away from the unconditional by w times the difference (Ho & Salimans with w = 1 + their w).
    difference = np.asarray(CONDITIONAL) - np.asarray(UNCONDITIONAL)
    np.testing.assert_allclose(
        guide(CONDITIONAL, UNCONDITIONAL, 7.5), UNCONDITIONAL + 7.5 * difference, atol=1e-5
    )


@pytest.mark.parametrize("kind", [Prediction.EPSILON, Prediction.V])
def test_is_the_same_rule_for_every_prediction(kind):
    log_snr = jnp.array([-2.0, 0.0, 3.0])

    def as_kind(x0):
        return convert(x0, x_t=X_T, log_snr=log_snr, source=Prediction.X0, target=kind)

    in_kind = guide(as_kind(CONDITIONAL), as_kind(UNCONDITIONAL), 4.0)
    in_x0 = convert(in_kind, x_t=X_T, log_snr=log_snr, source=kind, target=Prediction.X0)
    np.testing.assert_allclose(in_x0, guide(CONDITIONAL, UNCONDITIONAL, 4.0), atol=1e-3)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_puts_the_contrast_back(rescale):
    """arXiv 2305.08891, equations 14 to 16, picture by picture in NumPy."""
    guided = guide(CONDITIONAL, UNCONDITIONAL, 7.5)
    made = np.asarray(rescale_guided(guided, CONDITIONAL, rescale), np.float64)
    for picture, strong, plain in zip(made, np.asarray(guided), np.asarray(CONDITIONAL)):
        expected = rescale * strong * plain.std() / strong.std() + (1 - rescale) * strong
        np.testing.assert_allclose(picture, expected, rtol=1e-4, atol=1e-5)
    flat = jnp.full((1, 4, 4, 3), 2.0)
    np.testing.assert_array_equal(np.isfinite(rescale_guided(0 * flat, flat, rescale)), True)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (GuidanceConfig(), [0, 1, 2, 3, 4, 5]),
        (GuidanceConfig(log_snr_min=-2.0, log_snr_max=2.0), [1, 2, 3]),
        (GuidanceConfig(log_snr_max=0.0), [0, 1, 2]),
        (GuidanceConfig(log_snr_min=1.0), [3, 4, 5]),
        (GuidanceConfig(oscillate_after=0), [1, 3, 5]),
        (GuidanceConfig(oscillate_after=3), [0, 1, 2, 4]),
        (GuidanceConfig(oscillate_after=3, log_snr_min=-2.0), [1, 2, 4]),
    ],
    ids=str,
)
def test_which_steps_are_guided(config, steps):
    levels = jnp.array([-4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
    assert [i for i in range(6) if config.is_guided(levels[i], jnp.asarray(i))] == steps
    assert config.at_every_step == (len(steps) == 6)


@pytest.mark.parametrize(
    "fields", [{"rescale": 1.5}, {"oscillate_after": -1}, {"log_snr_max": 1.0, "log_snr_min": 1.0}]
)
def test_bad_configs(fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        GuidanceConfig(**fields)
