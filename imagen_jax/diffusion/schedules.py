"""Noise schedules as functions from time to log signal-to-noise ratio.

Time t runs from 0 (data) to 1 (noise). A schedule is wholly given by `log_snr(t)`; the process is variance
preserving, so α² = sigmoid(log_snr) and σ² = sigmoid(−log_snr) (Kingma et al. 2021, arXiv 2107.00630).
"""

import dataclasses
import functools
import math
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.limits import MAX_LOG_SNR, MAX_STEPS, check_numbers


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
        check_numbers(self, log_snr_min=MAX_LOG_SNR, log_snr_max=MAX_LOG_SNR, shift=MAX_LOG_SNR)

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

    def __post_init__(self) -> None:
        check_numbers(self, log_snr_max=MAX_LOG_SNR)

    def log_snr(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-SNR −log(expm1(0.1·t + 9.95·t²)), at most `log_snr_max`, at times t in [0, 1]."""
        integral = 0.1 * t + 9.95 * t**2
        smallest = math.log1p(math.exp(-self.log_snr_max))  # keeps log and its argument finite at t = 0
        return -jnp.log(jnp.expm1(jnp.maximum(integral, smallest)))


# Largest part of a step by which a time may lie beyond it and still count as that step: float32 times do.
_STEP_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteCosineSchedule:
    """The cosine schedule in steps, each with a noise level of its own (Nichol & Dhariwal, arXiv 2102.09672, 3.2).

    Time t lies in step ceil(t·steps) − 1. Networks trained on it are told the number of the step, and their
    learned variances belong to it. DeepFloyd IF uses it with 1000 steps.
    """

    KIND: ClassVar[str] = "discrete_cosine"
    steps: int = 1000  # levels
    max_beta: float = 0.999  # largest β of a step

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        if not 0.0 < self.max_beta < 1.0:
            raise ValueError(f"max_beta must be in (0, 1), got {self.max_beta}")
        check_numbers(self, steps=MAX_STEPS)

    def betas(self) -> Float[np.ndarray, " steps"]:
        """β of each step, float32: min(1 − f(i+1)/f(i), max_beta) with f(i) = cos²((i/steps + 0.008)/1.008·π/2)."""

        def f(i: int) -> float:
            return math.cos((i / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2

        values = [min(1.0 - f(i + 1) / f(i), self.max_beta) for i in range(self.steps)]
        return np.asarray(values, np.float32)

    def alphas_cumprod(self) -> Float[np.ndarray, " steps"]:
        """ᾱ of each step, float32: products of the float32 numbers 1 − β in float64."""
        alphas = np.float32(1.0) - self.betas()
        return np.cumprod(alphas.astype(np.float64)).astype(np.float32)

    def table(self) -> Float[np.ndarray, " steps"]:
        """Log-SNR of each step in nats, float32, falling."""
        return _log_snr_table(self)

    def log_snr(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-SNR of the step in which t in [0, 1] lies."""
        number = jnp.ceil(t * self.steps - _STEP_TOLERANCE).astype(jnp.int32) - 1
        return jnp.asarray(self.table())[jnp.clip(number, 0, self.steps - 1)]

    def timestep(self, log_snr: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Number of the step with this log-SNR, from 0; between two steps interpolated linearly in log-SNR."""
        rising = jnp.asarray(self.table()[::-1])
        return jnp.interp(log_snr, rising, jnp.arange(self.steps - 1, -1, -1, dtype=jnp.float32))


@functools.lru_cache(maxsize=8)
def _log_snr_table(schedule: DiscreteCosineSchedule) -> np.ndarray:
    signal = schedule.alphas_cumprod().astype(np.float64)
    return np.log(signal / (1.0 - signal)).astype(np.float32)
