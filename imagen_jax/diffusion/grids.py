"""The noise levels at which a sampler calls the network, from the noisiest to the cleanest."""

import dataclasses
import enum

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.schedules import Schedule
from imagen_jax.limits import MAX_LOG_SNR, check_numbers


class Grid(enum.StrEnum):
    """How the levels are spread."""

    TIME = "time"  # uniform in the schedule's time t
    LOG_SNR = "log_snr"  # uniform in log-SNR (arXiv 2206.00927, section 4)
    KARRAS = "karras"  # uniform in (σ/α)^(1/rho) (arXiv 2206.00364, equation 5)
    LEADING = "leading"  # of 1000 timesteps every (1000 // steps)-th from 0 (arXiv 2305.08891, table 2)
    # Named schedules of DeepFloyd IF: few or many of the 1000 timesteps where they are needed less or more.
    FAST27 = "fast27"
    SMART27 = "smart27"
    SMART50 = "smart50"
    SMART100 = "smart100"


TIMESTEPS = 1000  # of the discrete process that the grids `leading` and DeepFloyd's named ones speak of
# Timesteps taken from each of as many equal parts of the 1000, the cleanest part first.
NAMED_COUNTS: dict[Grid, tuple[int, ...]] = {
    Grid.FAST27: (10, 10, 3, 2, 2),
    Grid.SMART27: (7, 4, 2, 1, 2, 4, 7),
    Grid.SMART50: (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    Grid.SMART100: (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
}


def spaced_timesteps(counts: tuple[int, ...], timesteps: int = TIMESTEPS) -> tuple[int, ...]:
    """Timesteps spread evenly within equal parts, both ends of each part taken; falling.

    Args:
      counts: how many of each part, the cleanest first; a part of which one is taken gives its first.
      timesteps: of the process. Where they do not divide, the first parts are longer by one.
    """
    taken: list[int] = []
    base, longer = divmod(timesteps, len(counts))
    start = 0
    for number, count in enumerate(counts):
        size = base + (number < longer)
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        taken += [start + round(stride * i) for i in range(count)]
        start += size
    return tuple(reversed(taken))


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
        check_numbers(self, rho=1000.0, log_snr_min=MAX_LOG_SNR, log_snr_max=MAX_LOG_SNR)
        if self.rho < 1.0:
            raise ValueError(f"rho must be at least 1, got {self.rho}")
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(
                f"log_snr_min must be below log_snr_max, got {self.log_snr_min} and {self.log_snr_max}"
            )

    @property
    def own_steps(self) -> int | None:
        """Number of steps of a named grid; None: any."""
        return sum(NAMED_COUNTS[self.kind]) if self.kind in NAMED_COUNTS else None

    def timesteps(self, steps: int) -> tuple[int, ...] | None:
        """The timesteps of a grid that is made of them, falling; None for the others.

        Raises:
          ValueError: a named grid has another number of steps, or there are not as many timesteps.
        """
        if self.own_steps is not None and steps != self.own_steps:
            raise ValueError(f"the grid {self.kind.value} has {self.own_steps} steps, not {steps}")
        if self.kind in NAMED_COUNTS:
            return spaced_timesteps(NAMED_COUNTS[self.kind])
        if self.kind is not Grid.LEADING:
            return None
        if steps > TIMESTEPS:
            raise ValueError(f"the grid leading has at most {TIMESTEPS} steps, got {steps}")
        return tuple(range((steps - 1) * (TIMESTEPS // steps), -1, -(TIMESTEPS // steps)))

    def log_snrs(self, schedule: Schedule, steps: int) -> Float[Array, " steps"]:
        """Log-SNR of each network step, rising.

        The time and log_snr grids divide their range into `steps` parts and take the noisier end of each; the
        Karras grid takes both ends of its range, as published. From the last level a sampler goes to the clean
        picture.

        Args:
          schedule: noise level as a function of time.
          steps: number of levels, at least 1.

        Raises:
          ValueError: a grid made of timesteps does not have so many.
        """
        if (chosen := self.timesteps(steps)) is not None:
            return schedule.log_snr((jnp.asarray(chosen, jnp.float32) + 1.0) / TIMESTEPS)
        if self.kind is Grid.TIME:
            return schedule.log_snr(jnp.linspace(1.0, 0.0, steps + 1)[:-1])
        low = jnp.maximum(schedule.log_snr(jnp.ones(())), self.log_snr_min)
        high = jnp.minimum(schedule.log_snr(jnp.zeros(())), self.log_snr_max)
        if self.kind is Grid.LOG_SNR:
            return low + (high - low) * jnp.arange(steps, dtype=jnp.float32) / steps
        noisiest, cleanest = (jnp.exp(-0.5 * end / self.rho) for end in (low, high))
        ramp = jnp.arange(steps) / max(steps - 1, 1)
        return -2.0 * self.rho * jnp.log(noisiest + ramp * (cleanest - noisiest))
