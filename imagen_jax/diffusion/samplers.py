"""The table of samplers, and how a stage says which it takes."""

import dataclasses
import enum
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.diffusion.ddpm import DDIM, DDPM
from imagen_jax.diffusion.dpmpp import DPMSolverPP2M
from imagen_jax.diffusion.dpmpp_3m import DPMSolverPP3M
from imagen_jax.diffusion.grids import GridConfig
from imagen_jax.diffusion.heun import Heun
from imagen_jax.diffusion.rules import Rule
from imagen_jax.diffusion.schedules import Schedule
from imagen_jax.limits import MAX_STEPS, check_numbers


class Sampler(enum.StrEnum):
    """The rule for one step."""

    DDPM = "ddpm"  # ancestral sampling, stochastic
    DDIM = "ddim"  # first order; stochastic with eta > 0
    DPMPP = "dpmpp"  # DPM-Solver++(2M), second order
    DPMPP_SDE = "dpmpp_sde"  # SDE-DPM-Solver++(2M), stochastic
    DPMPP_3M = "dpmpp_3m"  # DPM-Solver++(3M), third order
    HEUN = "heun"  # Heun's method of EDM, second order; two network calls a step; stochastic with churn > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a stage is sampled."""

    kind: Sampler = Sampler.DDPM  # how a step goes from one noise level to the next
    steps: int = 256  # levels of the grid; a step is one network call (heun: two, but one in the last step)
    grid: GridConfig | None = (
        None  # None: time for ddpm and ddim, log_snr for dpmpp, dpmpp_sde, dpmpp_3m, karras for heun
    )
    # DDPM variance σ̃²^(1−γ)·σ_{t|s}²^γ: between the posterior's (γ = 0) and the forward step's (γ = 1).
    variance_interpolation: float = 0.2
    learned_variance: bool = True  # ddpm: that of a network which learned one takes the place of the above
    eta: float = 0.0  # DDIM: 0 deterministic, 1 the posterior's variance (arXiv 2010.02502, equation 16)
    churn: float = (
        0.0  # heun: S_churn of arXiv 2206.00364, algorithm 2: noise put back, shared among all steps
    )
    churn_noise: float = 1.0  # heun: S_noise, the standard deviation of the noise put back (EDM: 1 to 1.007)
    first_step: int = (
        0  # steps of the grid that are left out, the noisiest: who starts from a picture begins there
    )
    # ddpm, ddim: how often a stretch of `jump` steps is walked, noise being put back between (arXiv 2201.09865).
    resamplings: int = 1
    jump: int = 4  # steps of such a stretch

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.grid is not None:
            self.grid.timesteps(self.steps)  # refuses a number of steps that the grid does not have
        for name in ("variance_interpolation", "eta"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("churn", "churn_noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        check_numbers(self, steps=MAX_STEPS, churn_noise=10.0, resamplings=MAX_STEPS, jump=MAX_STEPS)
        if not 0 <= self.first_step < self.steps:
            raise ValueError(f"first_step must be in [0, {self.steps}), got {self.first_step}")
        for name in ("resamplings", "jump"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.resamplings > 1 and self.kind not in (Sampler.DDPM, Sampler.DDIM):
            raise ValueError(
                f"resamplings {self.resamplings} need ddpm or ddim, which remember nothing, not {self.kind.value}"
            )

    @property
    def rule(self) -> Rule:
        """The sampler itself."""
        return _RULES[self.kind](self)

    @property
    def network_calls(self) -> int:
        """Network calls a picture, each on the doubled batch when guided: steps; heun 2·steps − 1."""
        return self.rule.network_calls(self.steps - self.first_step) if self.walk is None else len(self.walk)

    @property
    def walk(self) -> tuple[int, ...] | None:
        """Which step each network call makes, from 0, where some are made again; None: one after the other.

        The last step ends without noise, and is made once.
        """
        if self.resamplings == 1:
            return None
        steps, calls = self.steps - self.first_step, list[int]()
        for begin in range(0, steps, self.jump):
            end = min(begin + self.jump, steps)
            for turn in range(self.resamplings):
                last = turn == self.resamplings - 1
                calls += range(begin, end if last or end < steps else end - 1)
        return tuple(calls)

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise of their own, so that the first noise alone does not decide the picture."""
        return self.rule.stochastic

    def log_snrs(self, schedule: Schedule) -> Float[Array, " steps"]:
        """Log-SNR of each step on the config's grid, from `first_step` on."""
        grid = self.grid or GridConfig(kind=self.rule.GRID)
        return grid.log_snrs(schedule, self.steps)[self.first_step :]

    def step_at(self, time: float, schedule: Schedule) -> int:
        """The step of the whole grid that begins nearest to a time of the schedule, in [0, 1]."""
        grid = dataclasses.replace(self, first_step=0).log_snrs(schedule)
        wanted = schedule.log_snr(jnp.asarray(time, jnp.float32))
        # Between levels that both are without signal, or without noise, time cannot tell.
        angles = jnp.arctan(jnp.exp(-0.5 * grid)) - jnp.arctan(jnp.exp(-0.5 * wanted))
        return int(jnp.argmin(jnp.abs(angles)))


# A new sampler is a file with its `Rule`, a name in `Sampler` and an entry here.
_RULES: dict[Sampler, Callable[[SamplerConfig], Rule]] = {
    Sampler.DDPM: lambda config: DDPM(variance_interpolation=config.variance_interpolation),
    Sampler.DDIM: lambda config: DDIM(eta=config.eta),
    Sampler.DPMPP: lambda config: DPMSolverPP2M(),
    Sampler.DPMPP_SDE: lambda config: DPMSolverPP2M(sde=True),
    Sampler.DPMPP_3M: lambda config: DPMSolverPP3M(),
    Sampler.HEUN: lambda config: Heun(churn=config.churn, churn_noise=config.churn_noise),
}
