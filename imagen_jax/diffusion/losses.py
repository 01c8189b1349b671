"""Training losses: mean squared error in the space of ε, v or x0, with optional Min-SNR weights."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.process import Prediction, convert
from imagen_jax.limits import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """In which space the error is measured, and how noise levels are weighed."""

    space: Prediction = (
        Prediction.EPSILON
    )  # squared error of this quantity; Imagen: epsilon (arXiv 2205.11487, 2.1)
    snr_cap: float | None = None  # levels of a higher SNR weigh, on the x0 error, like this one; None: no cap
    min_snr_gamma: float | None = (
        None  # γ of Min-SNR weighting (arXiv 2303.09556: 5); None: every level weighs 1
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.space is Prediction.SCORE:
            raise ValueError("loss space must be x0, epsilon or v, got 'score'")
        for name in ("snr_cap", "min_snr_gamma"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.snr_cap is not None and self.min_snr_gamma is not None:
            raise ValueError(
                f"snr_cap {self.snr_cap} and min_snr_gamma {self.min_snr_gamma}: give one of them"
            )


def min_snr_weight(
    log_snr: Float[Array, "*shape"], *, gamma: float, space: Prediction
) -> Float[Array, "*shape"]:
    """Weight of a noise level for a loss in the given space (arXiv 2303.09556, section 3.4).

    min(SNR, γ) for x0, divided by SNR for ε and by SNR + 1 for v: the same effective weight on the x0 error.
    """
    snr = jnp.exp(log_snr)
    clipped = jnp.minimum(snr, gamma)
    match space:
        case Prediction.X0:
            return clipped
        case Prediction.EPSILON:
            return clipped / snr
        case Prediction.V:
            return clipped / (snr + 1.0)
        case _:
            raise ValueError(f"Min-SNR weights are defined for x0, epsilon and v, got {space}")


def snr_cap_weight(
    log_snr: Float[Array, "*shape"], *, snr_cap: float, space: Prediction
) -> Float[Array, "*shape"]:
    """Weight that makes the x0 error of every level above `snr_cap` count like that of a level at the cap.

    An ε-loss weighs the x0 error by SNR and a v-loss by SNR + 1, which has no bound: where a network predicts
    x0, a handful of nearly clean examples would decide every step. The x0-loss weighs all levels by 1 already.
    """
    capped, snr = jnp.exp(jnp.minimum(log_snr, jnp.log(snr_cap))), jnp.exp(log_snr)
    match space:
        case Prediction.EPSILON:
            return capped / snr
        case Prediction.V:
            return (capped + 1.0) / (snr + 1.0)
        case _:
            return jnp.ones_like(log_snr)


def diffusion_loss(
    output: Float[Array, "batch *shape"],
    *,
    x0: Float[Array, "batch *shape"],
    x_t: Float[Array, "batch *shape"],
    log_snr: Float[Array, " batch"],
    prediction: Prediction,
    config: LossConfig,
) -> Float[Array, " batch"]:
    """Weighted mean squared error of each example, in float32.

    Args:
      output: the network's output, a quantity of kind `prediction`.
      x0: clean pictures in [−1, 1].
      x_t: the noisy pictures that the network saw.
      log_snr: their log signal-to-noise ratios.
      prediction: what the output means.
      config: the loss's space and weights.
    """
    output = output.astype(jnp.float32)
    truth = convert(x0, x_t=x_t, log_snr=log_snr, source=Prediction.X0, target=config.space)
    guess = convert(output, x_t=x_t, log_snr=log_snr, source=prediction, target=config.space)
    error = jnp.mean(jnp.square(guess - truth), axis=tuple(range(1, x0.ndim)))
    if config.snr_cap is not None:
        error = error * snr_cap_weight(log_snr, snr_cap=config.snr_cap, space=config.space)
    if config.min_snr_gamma is not None:
        error = error * min_snr_weight(log_snr, gamma=config.min_snr_gamma, space=config.space)
    return error
