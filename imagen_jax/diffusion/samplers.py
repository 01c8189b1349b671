"""One loop from noise to data, and the rules for its single step.

All randomness of image i comes from its own key, so that a picture does not depend on its batch.
"""

import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from imagen_jax.diffusion.process import Prediction, expand_to, to_x0_and_epsilon
from imagen_jax.diffusion.schedules import Schedule, alpha_sigma

# (x_t, log_snr of each image) → x̂0: guidance and thresholding included.
Denoiser = Callable[[Float[Array, "batch *shape"], Float[Array, " batch"]], Float[Array, "batch *shape"]]


class Sampler(enum.StrEnum):
    """The rule for one step."""

    DDPM = "ddpm"
    DDIM = "ddim"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a stage is sampled."""

    kind: Sampler = Sampler.DDPM
    steps: int = 256  # network calls (each on the doubled batch when guided)
    # DDPM variance σ̃²^(1−γ)·σ_{t|s}²^γ: between the posterior's (γ = 0) and the forward step's (γ = 1).
    variance_interpolation: float = 0.2
    eta: float = 0.0  # DDIM: 0 deterministic, 1 the posterior's variance (arXiv 2010.02502, equation 16)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0.0 <= self.variance_interpolation <= 1.0:
            raise ValueError(f"variance_interpolation must be in [0, 1], got {self.variance_interpolation}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")


def image_noise(
    keys: Key[Array, " batch"], step: Array | int, shape: tuple[int, ...]
) -> Float[Array, "batch ..."]:
    """Unit Gaussian noise (batch, *shape) in float32, each image's from its own key and the step's number."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)


def ddpm_step(
    x_t: Float[Array, "batch *shape"],
    x0: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    log_snr_t: Float[Array, " batch"],
    log_snr_s: Float[Array, " batch"],
    *,
    variance_interpolation: float,
) -> Float[Array, "batch *shape"]:
    """Draws x_s from q(x_s | x_t, x̂0), s < t (arXiv 2202.00512, appendix B, equations 13–14)."""
    log_snr_t, log_snr_s = expand_to(log_snr_t, x_t), expand_to(log_snr_s, x_t)
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    ratio = jnp.exp(log_snr_t - log_snr_s)  # SNR(t) / SNR(s) < 1
    fresh = -jnp.expm1(log_snr_t - log_snr_s)
    mean = ratio * (alpha_s / alpha_t) * x_t + fresh * alpha_s * x0
    # Both bounds of the variance share the factor `fresh`.
    std = jnp.sqrt(fresh) * sigma_s ** (1.0 - variance_interpolation) * sigma_t**variance_interpolation
    return mean + std * noise


def ddim_step(
    x_t: Float[Array, "batch *shape"],
    x0: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    log_snr_t: Float[Array, " batch"],
    log_snr_s: Float[Array, " batch"],
    *,
    eta: float,
) -> Float[Array, "batch *shape"]:
    """α_s·x̂0 + √(σ_s² − w²)·ε̂ + w·noise with w = η·(posterior's std) (arXiv 2010.02502, equation 12)."""
    _, epsilon = to_x0_and_epsilon(x0, x_t=x_t, log_snr=log_snr_t, source=Prediction.X0)
    alpha_s, sigma_s = alpha_sigma(expand_to(log_snr_s, x_t))
    fresh = -jnp.expm1(expand_to(log_snr_t - log_snr_s, x_t))
    std = eta * jnp.sqrt(fresh) * sigma_s
    return alpha_s * x0 + jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0.0)) * epsilon + std * noise


def sample(
    denoiser: Denoiser,
    *,
    keys: Key[Array, " batch"],
    shape: tuple[int, ...],
    schedule: Schedule,
    config: SamplerConfig,
) -> Float[Array, "batch *shape"]:
    """Draws a batch from noise to data in one `lax.scan`.

    Args:
      denoiser: gives x̂0 from x_t and the log-SNR of each image.
      keys: one key an image; the image depends on its own key only.
      shape: of one image.
      schedule: noise level as a function of time; the grid is uniform in t from 1 to 0.
      config: sampler and steps.

    Returns:
      The last x̂0, float32, (batch, *shape). No noise is added after the last network call.
    """
    times = jnp.linspace(1.0, 0.0, config.steps + 1)
    log_snrs = schedule.log_snr(times)
    batch = keys.shape[0]

    def step(x_t: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        index, log_snr_t, log_snr_s = inputs
        log_snr_t = jnp.broadcast_to(log_snr_t, (batch,))
        log_snr_s = jnp.broadcast_to(log_snr_s, (batch,))
        x0 = denoiser(x_t, log_snr_t)
        noise = image_noise(keys, index + 1, shape)
        if config.kind is Sampler.DDPM:
            x_s = ddpm_step(
                x_t, x0, noise, log_snr_t, log_snr_s, variance_interpolation=config.variance_interpolation
            )
        else:
            x_s = ddim_step(x_t, x0, noise, log_snr_t, log_snr_s, eta=config.eta)
        # The last call's x̂0 is the sample: what remains of noise at t = 0 would only be added to be seen.
        return jnp.where(index + 1 == config.steps, x0, x_s), jnp.zeros(())

    x_1 = image_noise(keys, 0, shape)
    result, _ = jax.lax.scan(step, x_1, (jnp.arange(config.steps), log_snrs[:-1], log_snrs[1:]))
    return result
