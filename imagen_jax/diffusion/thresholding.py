"""Thresholding of the predicted clean picture at each sampling step (arXiv 2205.11487, section 2.3)."""

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.limits import check_numbers


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

    max_scale: float | None = (
        None  # largest s by which dynamic thresholding divides; None: any. DeepFloyd I: 1.5
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.max_scale is not None and self.max_scale < 1.0:
            raise ValueError(f"max_scale must be at least 1, got {self.max_scale}")
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"percentile must be in [0, 100] percent, got {self.percentile}")
        if self.kind is Threshold.DYNAMIC and self.percentile <= 1.0:
            raise ValueError(f"percentile is given in percent (99.5, not 0.995), got {self.percentile}")


def magnitude_percentile(values: Float[Array, "batch *shape"], percentile: float) -> Float[Array, " batch"]:
    """The percentile of |values| over each example, interpolated linearly between order statistics.

    The order statistic is found bit by bit: non-negative floats are ordered as their bits are, so that 31 counts
    of what lies below a bound decide it. Sorting a picture of 1024² pixels takes an accelerator longer than that,
    and a picture whose rows lie on several devices would have to be gathered first.

    Args:
      values: float32.
      percentile: percent, in [0, 100].
    """
    axes = tuple(range(1, values.ndim))
    magnitudes = jnp.abs(values.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.int32)
    index = percentile / 100.0 * (math.prod(values.shape[1:]) - 1)
    rank = math.floor(index)  # from 0

    def add_bit(number: Array, found: Array) -> Array:
        # Largest pattern with at most `rank` values strictly below it: that is the value of this rank.
        candidate = found | (1 << (30 - number))
        below = jnp.sum(bits < candidate.reshape(-1, *(1 for _ in axes)), axis=axes)
        return jnp.where(below <= rank, candidate, found)

    found = jax.lax.fori_loop(0, 31, add_bit, jnp.zeros(len(values), jnp.int32))
    lower = jax.lax.bitcast_convert_type(found, jnp.float32)
    if index == rank:
        return lower
    bound = lower.reshape(-1, *(1 for _ in axes))
    above = jnp.min(jnp.where(magnitudes > bound, magnitudes, jnp.inf), axis=axes)
    upper = jnp.where(jnp.sum(magnitudes <= bound, axis=axes) >= rank + 2, lower, above)
    return lower + (index - rank) * (upper - lower)


def threshold(x0: Float[Array, "batch *shape"], config: ThresholdConfig) -> Float[Array, "batch *shape"]:
    """Keeps x̂0 within [−1, 1].

    Static: clip. Dynamic: s = max(1, the percentile of |x̂0| over the picture), at most max_scale; clip to [−s, s],
    divide by s.
    """
    match config.kind:
        case Threshold.NONE:
            return x0
        case Threshold.STATIC:
            return jnp.clip(x0, -1.0, 1.0)
        case Threshold.DYNAMIC:
            scale = jnp.clip(magnitude_percentile(x0, config.percentile), 1.0, config.max_scale)
            scale = scale.reshape(-1, *(1,) * (x0.ndim - 1)).astype(x0.dtype)
            return jnp.clip(x0, -scale, scale) / scale
