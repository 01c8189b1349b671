"""How the noise level of a training example is drawn: one uniform number becomes a log-SNR.

An object says how, so that examples keep their noise levels whatever else is drawn for them, and the inverse of its
distribution function is all that it is.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedules import Schedule
from imagen_jax.limits import MAX_LOG_SNR, check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformTime:
    """Times are uniform in [0, 1], so that the schedule decides (Imagen: arXiv 2205.11487, section 2.1)."""

    KIND: ClassVar[str] = "uniform_time"

    def log_snr(self, schedule: Schedule, uniform: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """Log-SNR of each example.

        Args:
          schedule: of the stage.
          uniform: in [0, 1].
        """
        return schedule.log_snr(uniform)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformInterval:
    """Times are uniform in an interval: a stage that only ever sees a part of the way (arXiv 2211.01324, section 4)."""

    KIND: ClassVar[str] = "uniform_interval"
    time_min: float = 0.0  # in [0, 1); 0 is data
    time_max: float = 1.0  # in (0, 1]; 1 is noise

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0.0 <= self.time_min < self.time_max <= 1.0:
            raise ValueError(
                f"time_min {self.time_min} must be below time_max {self.time_max}, both in [0, 1]"
            )

    def log_snr(self, schedule: Schedule, uniform: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """Log-SNR of each example; arguments as of `UniformTime.log_snr`."""
        return schedule.log_snr(self.time_min + (self.time_max - self.time_min) * uniform)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalLogSNR:
    """Log-SNRs are normal, cut to what the schedule spans (arXiv 2206.00364, table 1: ln σ ~ N(−1.2, 1.2²)).

    A log-SNR is −2·ln σ there: a mean of 2.4 and a standard deviation of 2.4 nats.
    """

    KIND: ClassVar[str] = "normal_log_snr"
    mean: float = 2.4  # nats
    std: float = 2.4  # nats

    def __post_init__(self) -> None:
        check_numbers(self, mean=MAX_LOG_SNR, std=MAX_LOG_SNR)
        if self.std <= 0.0:
            raise ValueError(f"std must be positive, got {self.std}")

    def log_snr(self, schedule: Schedule, uniform: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """Log-SNR of each example; arguments as of `UniformTime.log_snr`."""
        drawn = self.mean + self.std * jax.scipy.special.ndtri(uniform)
        ends = schedule.log_snr(jnp.array([1.0, 0.0], drawn.dtype))
        return jnp.clip(drawn, ends[0], ends[1])


NoiseLevels = UniformTime | UniformInterval | NormalLogSNR
