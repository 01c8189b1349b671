"""Classifier-free guidance: the rule, when it applies, and what keeps its contrast in bounds."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.limits import MAX_LOG_SNR, check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """When a stage is guided, and how far contrast is put back; all of it together is allowed.

    Where a step is not guided the network is called on the single batch, with the prompt alone.
    """

    # Guided only at levels in [log_snr_min, log_snr_max], in nats (arXiv 2404.07724); None: no bound.
    log_snr_min: float | None = None
    log_snr_max: float | None = None  # the other bound
    # Guided at this many first steps, then at every other one, beginning with one that is not guided
    # (oscillating guidance of Imagen Video, arXiv 2210.02303, with the lower weight 1); None: at every step.
    oscillate_after: int | None = None
    rescale: float = 0.0  # φ in [0, 1] of arXiv 2305.08891, section 3.4 (there 0.7); 0: off

    def __post_init__(self) -> None:
        check_numbers(self, log_snr_min=MAX_LOG_SNR, log_snr_max=MAX_LOG_SNR)
        low, high = self.log_snr_min, self.log_snr_max
        if low is not None and high is not None and not low < high:
            raise ValueError(f"guidance log_snr_min must be below log_snr_max, got {low} and {high}")
        if self.oscillate_after is not None and self.oscillate_after < 0:
            raise ValueError(f"oscillate_after must be 0 or more, got {self.oscillate_after}")
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"guidance rescale must be in [0, 1], got {self.rescale}")

    @property
    def at_every_step(self) -> bool:
        """Whether no step is left unguided."""
        return self.log_snr_min is None and self.log_snr_max is None and self.oscillate_after is None

    def is_guided(self, log_snr: Float[Array, ""], step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a network call at a level and in a step (from 0) is guided."""
        low = -math.inf if self.log_snr_min is None else self.log_snr_min
        high = math.inf if self.log_snr_max is None else self.log_snr_max
        guided = (low <= log_snr) & (log_snr <= high)
        if self.oscillate_after is not None:
            guided &= (step < self.oscillate_after) | ((step - self.oscillate_after) % 2 == 1)
        return guided


def guide(
    conditional: Float[Array, "*shape"],
    unconditional: Float[Array, "*shape"],
    guidance_weight: Float[Array, ""] | float,
) -> Float[Array, "*shape"]:
    """w·conditional + (1 − w)·unconditional (arXiv 2205.11487, equation 2); w = 1 is no guidance.

    The weights sum to one, so that the rule is the same for ε, v and x0 of one x_t. With a negative prompt its
    output takes the place of the unconditional one.
    """
    return guidance_weight * conditional + (1.0 - guidance_weight) * unconditional


def rescale_guided(
    guided: Float[Array, "batch *shape"], conditional: Float[Array, "batch *shape"], rescale: float
) -> Float[Array, "batch *shape"]:
    """φ·guided·std(conditional)/std(guided) + (1 − φ)·guided (arXiv 2305.08891, equations 14–16).

    Args:
      guided: the network's guided output, of whatever prediction type.
      conditional: its output with the prompt.
      rescale: φ in [0, 1]. Standard deviations are those over all pixels and channels of each picture.
    """
    axes = tuple(range(1, guided.ndim))
    wanted = jnp.std(conditional, axis=axes, keepdims=True)
    # A flat output has no contrast to put back: 0/0 would make it none at all.
    present = jnp.maximum(jnp.std(guided, axis=axes, keepdims=True), 1e-6)
    return guided * (rescale * wanted / present + (1.0 - rescale))
