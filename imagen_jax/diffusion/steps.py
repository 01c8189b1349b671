"""The rules that take x_t to less noise, s < t, given the clean picture x̂0 that the network sees in x_t.

All are written in x̂0 and in quotients that stay finite where x_t has no signal at all (α_t = 0).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.process import Prediction, expand_to, to_x0_and_epsilon
from imagen_jax.diffusion.schedules import alpha_sigma


def ddpm_step(
    x_t: Float[Array, "batch *shape"],
    x0: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    log_snr_t: Float[Array, " batch"],
    log_snr_s: Float[Array, " batch"],
    *,
    variance_interpolation: float | Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """Draws x_s from q(x_s | x_t, x̂0) (arXiv 2202.00512, appendix B, equations 13–14).

    With variance_interpolation 0 this is the exact posterior, and also the first-order SDE-DPM-Solver++
    (arXiv 2211.01095, appendix): (σ_s/σ_t)·e^−h = α_t·σ_s² / (α_s·σ_t²) and 1 − e^−2h = 1 − SNR(t)/SNR(s).

    A network that learns the variance gives an interpolation for each pixel and channel (arXiv 2102.09672,
    equation 15).
    """
    log_snr_t, log_snr_s = expand_to(log_snr_t, x_t), expand_to(log_snr_s, x_t)
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    fresh = -jnp.expm1(log_snr_t - log_snr_s)  # 1 − SNR(t) / SNR(s)
    # Not SNR(t)/SNR(s)·α_s/α_t, which is the same but 0/0 where α_t is 0.
    mean = alpha_t * sigma_s**2 / (alpha_s * sigma_t**2) * x_t + fresh * alpha_s * x0
    # Both bounds of the variance share the factor `fresh`.
    std = jnp.sqrt(fresh) * sigma_s ** (1.0 - variance_interpolation) * sigma_t**variance_interpolation
    return mean + std * noise


def ddim_step(
    x_t: Float[Array, "batch *shape"],
    x0: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"] | None,
    log_snr_t: Float[Array, " batch"],
    log_snr_s: Float[Array, " batch"],
    *,
    eta: float,
) -> Float[Array, "batch *shape"]:
    """α_s·x̂0 + √(σ_s² − w²)·ε̂ + w·noise with w = η·(posterior's std) (arXiv 2010.02502, equation 12).

    With η = 0, where noise has no say and may be None, this is also the first-order DPM-Solver++ (arXiv 2211.01095,
    section 4.1) and an Euler step of the probability flow in σ/α (arXiv 2206.00364, section 4).
    """
    _, epsilon = to_x0_and_epsilon(x0, x_t=x_t, log_snr=log_snr_t, source=Prediction.X0)
    alpha_s, sigma_s = alpha_sigma(expand_to(log_snr_s, x_t))
    if noise is None or eta == 0.0:
        return alpha_s * x0 + sigma_s * epsilon
    fresh = -jnp.expm1(expand_to(log_snr_t - log_snr_s, x_t))
    std = eta * jnp.sqrt(fresh) * sigma_s
    return alpha_s * x0 + jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0)) * epsilon + std * noise


def heun_correction(
    x_s: Float[Array, "batch *shape"],
    x0_t: Float[Array, "batch *shape"],
    x0_s: Float[Array, "batch *shape"],
    log_snr_t: Float[Array, " batch"],
    log_snr_s: Float[Array, " batch"],
) -> Float[Array, "batch *shape"]:
    """Makes an Euler step second-order by the slope at its end (arXiv 2206.00364, algorithm 1, line 8).

    In y = x/α and τ = σ/α the slope is dy/dτ = ε̂, and Heun's rule adds (τ_s − τ_t)·(ε̂_s − ε̂_t)/2 to y_s. As
    both ε̂ belong to the Euler step's x_s, ε̂_s − ε̂_t = (x̂0_t − x̂0_s)/τ_s.

    Args:
      x_s: where the Euler step (DDIM, η = 0) from t arrived.
      x0_t: x̂0 at t.
      x0_s: x̂0 of x_s.
      log_snr_t: where the step began.
      log_snr_s: where it ended.
    """
    alpha_s, _ = alpha_sigma(expand_to(log_snr_s, x_s))
    growth = jnp.expm1(expand_to(0.5 * (log_snr_s - log_snr_t), x_s))  # τ_t/τ_s − 1
    return x_s + 0.5 * alpha_s * growth * (x0_s - x0_t)


def add_noise(
    x_s: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    log_snr_s: Float[Array, " batch"],
    log_snr_t: Float[Array, " batch"],
) -> Float[Array, "batch *shape"]:
    """x_s taken back to a noisier or equal level t: (α_t/α_s)·x_s + noise of what σ_t then lacks."""
    alpha_s, _ = alpha_sigma(expand_to(log_snr_s, x_s))
    alpha_t, sigma_t = alpha_sigma(expand_to(log_snr_t, x_s))
    # σ_t² − (α_t·σ_s/α_s)² = σ_t²·(1 − SNR(t)/SNR(s)), without a difference of near-equal numbers. Two equal
    # levels may come here apart by a rounding.
    added = jnp.sqrt(-jnp.expm1(jnp.minimum(expand_to(log_snr_t - log_snr_s, x_s), 0.0)))
    return alpha_t / alpha_s * x_s + sigma_t * added * noise
