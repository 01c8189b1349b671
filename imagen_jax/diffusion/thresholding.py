"""Thresholding of the predicted clean picture at each sampling step (arXiv 2205.11487, section 2.3)."""

import dataclasses
import enum

import jax.numpy as jnp
from jaxtyping import Array, Float


class Threshold(enum.StrEnum):
    """How x̂0 is kept in range."""

    NONE = "none"
    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Thresholding of x̂0; pictures lie in [−1, 1]."""

    kind: Threshold = Threshold.DYNAMIC  # Imagen uses dynamic thresholding in every stage
    percentile: float = 99.5  # percent, in [0, 100]; of |x̂0| over each picture, for dynamic thresholding

    def __post_init__(self) -> None:
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"percentile must be in [0, 100] percent, got {self.percentile}")
        if self.kind is Threshold.DYNAMIC and self.percentile <= 1.0:
            raise ValueError(f"percentile is given in percent (99.5, not 0.995), got {self.percentile}")


def threshold(x0: Float[Array, "batch *shape"], config: ThresholdConfig) -> Float[Array, "batch *shape"]:
    """Keeps x̂0 within [−1, 1].

    Static: clip. Dynamic: s = max(1, the percentile of |x̂0| over the picture), clip to [−s, s], divide by s.
    """
    match config.kind:
        case Threshold.NONE:
            return x0
        case Threshold.STATIC:
            return jnp.clip(x0, -1.0, 1.0)
        case Threshold.DYNAMIC:
            axes = tuple(range(1, x0.ndim))
            scale = jnp.percentile(jnp.abs(x0), config.percentile, axis=axes, keepdims=True)
            scale = jnp.maximum(scale, 1.0)
            return jnp.clip(x0, -scale, scale) / scale
