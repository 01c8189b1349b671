"""The noise levels at which a sampler calls the network, from the noisiest to the cleanest."""

import dataclasses
import enum

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedules import Schedule


class Grid(enum.StrEnum):
    """How the levels are spread."""

    TIME = "time"  # uniform in the schedule's time t
    LOG_SNR = "log_snr"  # uniform in log-SNR (arXiv 2206.00927, section 4)
    KARRAS = "karras"  # uniform in (σ/α)^(1/rho) (arXiv 2206.00364, equation 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Where a sampler's steps lie."""

    kind: Grid = Grid.TIME  # what the steps are even in
    rho: float = 7.0  # exponent of the Karras grid; the higher, the more steps at little noise
    # Ends of the log_snr and karras grids in nats; the schedule's own ends where those lie further inside. Beyond
    # them steps would be spent on less signal than a hundredth of a picture's noise, or on noise of less than
    # half a grey level of 255.
    log_snr_min: float = -12.0
    log_snr_max: float = 12.0  # the other end, of little noise

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"rho must be at least 1, got {self.rho}")
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(
                f"log_snr_min must be below log_snr_max, got {self.log_snr_min} and {self.log_snr_max}"
            )

    def log_snrs(self, schedule: Schedule, steps: int) -> Float[Array, " steps"]:
        """Log-SNR of each network step, rising.

        The time and log_snr grids divide their range into `steps` parts and take the noisier end of each; the
        Karras grid takes both ends of its range, as published. From the last level a sampler goes to the clean
        picture.

        Args:
          schedule: noise level as a function of time.
          steps: number of levels, at least 1.
        """
        if self.kind is Grid.TIME:
            return schedule.log_snr(jnp.linspace(1.0, 0.0, steps + 1)[:-1])
        low = jnp.maximum(schedule.log_snr(jnp.ones(())), self.log_snr_min)
        high = jnp.minimum(schedule.log_snr(jnp.zeros(())), self.log_snr_max)
        if self.kind is Grid.LOG_SNR:
            return low + (high - low) * jnp.arange(steps) / steps
        noisiest, cleanest = (jnp.exp(-0.5 * end / self.rho) for end in (low, high))
        ramp = jnp.arange(steps) / max(steps - 1, 1)
        return -2.0 * self.rho * jnp.log(noisiest + ramp * (cleanest - noisiest))
