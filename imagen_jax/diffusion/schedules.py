"""Noise schedules as functions from time to log signal-to-noise ratio.

Time t runs from 0 (data) to 1 (noise). A schedule is wholly given by `log_snr(t)`; the process is variance
preserving, so α² = sigmoid(log_snr) and σ² = sigmoid(−log_snr) (Kingma et al. 2021, arXiv 2107.00630).
"""

import dataclasses
import math
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Schedule(Protocol):
    """Anything that says how noisy x_t is at a time t."""

    def log_snr(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log signal-to-noise ratio log(α²/σ²) at time t in [0, 1], falling in t."""
        ...


def alpha_sigma(log_snr: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Signal and noise amplitudes (α, σ) with α² + σ² = 1 (arXiv 2205.11487, section 2.2)."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def _check_bounds(low: float, high: float) -> None:
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"log_snr_min must be below log_snr_max and both finite, got {low} and {high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """α = cos(πt/2) between two bounds, optionally shifted for the resolution.

    Imagen's base and 64→256 stages use it (arXiv 2205.11487, appendix F). The bounds keep both ends finite:
    the angle runs linearly between the two angles whose log-SNR they are (arXiv 2301.11093, section 3.1).
    """

    KIND: ClassVar[str] = "cosine"
    log_snr_min: float = -15.0  # nats, at t = 1 before the shift; −200 leaves no signal (zero terminal SNR)
    log_snr_max: float = 15.0  # nats, at t = 0 before the shift
    shift: float = 0.0  # nats added everywhere; 2·log(64/d) moves a schedule made for 64 pixels to d pixels

    def __post_init__(self) -> None:
        _check_bounds(self.log_snr_min, self.log_snr_max)

    def log_snr(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-SNR −2·log(tan(angle(t))) + shift at times t in [0, 1]."""
        first = math.atan(math.exp(-0.5 * self.log_snr_max))  # angle at t = 0
        rest = math.atan(math.exp(0.5 * self.log_snr_min))  # π/2 less the angle at t = 1
        span = math.pi / 2 - first - rest
        # cos(angle) as the sine of what is left to π/2: float32 angles near π/2 have lost that difference.
        tangent = jnp.log(jnp.sin(first + t * span)) - jnp.log(jnp.sin(rest + (1.0 - t) * span))
        return jnp.clip(-2.0 * tangent, self.log_snr_min, self.log_snr_max) + self.shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSchedule:
    """The continuous limit of Ho et al.'s 1000 linear steps, β from 1e-4 to 0.02.

    ∫₀ᵗ 1000·β = 0.1·t + 9.95·t², hence α² = exp(−(0.1·t + 9.95·t²)). Imagen's 256→1024 stage uses it
    (arXiv 2205.11487, appendix F).
    """

    KIND: ClassVar[str] = "linear"
    log_snr_max: float = 15.0  # nats; the unbounded schedule is infinite at t = 0

    def log_snr(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-SNR −log(expm1(0.1·t + 9.95·t²)), at most `log_snr_max`, at times t in [0, 1]."""
        integral = 0.1 * t + 9.95 * t**2
        smallest = math.log1p(math.exp(-self.log_snr_max))  # keeps log and its argument finite at t = 0
        return -jnp.log(jnp.expm1(jnp.maximum(integral, smallest)))
