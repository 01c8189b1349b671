"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.guidance import guide
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
