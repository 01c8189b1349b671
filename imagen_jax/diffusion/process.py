"""The forward process and the four ways of saying what x_t was made of.

x_t = α·x0 + σ·ε. Knowing x_t and the log-SNR, any one of x0, ε, v = α·ε − σ·x0 and the score −ε/σ gives the
others (Salimans & Ho 2022, arXiv 2202.00512, section 4 and appendix D).
"""

import enum
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedules import alpha_sigma

# Least α or σ that anything is divided by: where one of them is 0 (no signal, or no noise, at all) a quantity
# that the other values do not determine comes out wrong but finite.
SMALLEST_AMPLITUDE = 1e-6


class Prediction(enum.StrEnum):
    """What a network's output means."""

    X0 = "x0"
    EPSILON = "epsilon"
    V = "v"
    SCORE = "score"


def expand_to(values: Float[Array, " batch"], like: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """Appends axes of length one to `values` until it broadcasts against `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def diffuse(
    x0: Float[Array, "batch *shape"],
    epsilon: Float[Array, "batch *shape"],
    log_snr: Float[Array, " batch"],
) -> Float[Array, "batch *shape"]:
    """Draws x_t ~ q(x_t | x0) with the given unit Gaussian noise: α·x0 + σ·ε."""
    alpha, sigma = alpha_sigma(expand_to(log_snr, x0))
    return alpha * x0 + sigma * epsilon


def renoise(
    x_s: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    log_snr_s: Float[Array, " batch"],
    log_snr_t: Float[Array, " batch"],
) -> Float[Array, "batch *shape"]:
    """Draws x_t ~ q(x_t | x_s) at more noise, t > s (arXiv 2202.00512, appendix B; RePaint's way back).

    (α_t/α_s)·x_s + σ_{t|s}·noise, where σ_{t|s}² = (1 − SNR(t)/SNR(s))·σ_t².

    Args:
      x_s: at the level `log_snr_s`.
      noise: of unit variance.
      log_snr_s: where `x_s` is.
      log_snr_t: where to go; not above `log_snr_s`.
    """
    log_snr_s, log_snr_t = expand_to(log_snr_s, x_s), expand_to(log_snr_t, x_s)
    alpha_s, _ = alpha_sigma(log_snr_s)
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    std = jnp.sqrt(-jnp.expm1(jnp.minimum(log_snr_t - log_snr_s, 0.0))) * sigma_t
    return alpha_t / jnp.maximum(alpha_s, SMALLEST_AMPLITUDE) * x_s + std * noise


def to_x0_and_epsilon(
    value: Float[Array, "batch *shape"],
    *,
    x_t: Float[Array, "batch *shape"],
    log_snr: Float[Array, " batch"],
    source: Prediction,
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """The pair (x0, ε) that agrees with `x_t` and with a value of kind `source`.

    A kind that its noise level does not determine is ill-conditioned there: ε says little of x0 where α is
    near 0, x0 says little of ε where σ is near 0; v is safe at both ends. All results are finite even where α
    or σ is 0.
    """
    alpha, sigma = alpha_sigma(expand_to(log_snr, x_t))
    if source is Prediction.X0:
        return value, (x_t - alpha * value) / jnp.maximum(sigma, SMALLEST_AMPLITUDE)
    if source is Prediction.V:
        return alpha * x_t - sigma * value, sigma * x_t + alpha * value
    epsilon = value if source is Prediction.EPSILON else -sigma * value
    return (x_t - sigma * epsilon) / jnp.maximum(alpha, SMALLEST_AMPLITUDE), epsilon


def convert(
    value: Float[Array, "batch *shape"],
    *,
    x_t: Float[Array, "batch *shape"],
    log_snr: Float[Array, " batch"],
    source: Prediction,
    target: Prediction,
) -> Float[Array, "batch *shape"]:
    """Rewrites a value of kind `source` as kind `target`, given x_t and its log-SNR."""
    if source is target:
        return value
    x0, epsilon = to_x0_and_epsilon(value, x_t=x_t, log_snr=log_snr, source=source)
    alpha, sigma = alpha_sigma(expand_to(log_snr, x_t))
    match target:
        case Prediction.X0:
            return x0
        case Prediction.EPSILON:
            return epsilon
        case Prediction.V:
            return alpha * epsilon - sigma * x0
        case Prediction.SCORE:
            return -epsilon / jnp.maximum(sigma, SMALLEST_AMPLITUDE)


def time_condition(log_snr: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The number in [0, 1000] by which a network is told the noise level.

    It is 1000 times the cosine schedule's time of that level, (2/π)·arctan(σ/α), so that networks see the
    noise level itself whatever schedule or time grid led to it.
    """
    return (2000.0 / math.pi) * jnp.arctan(jnp.exp(-0.5 * log_snr))
