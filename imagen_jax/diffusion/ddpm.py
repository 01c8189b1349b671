"""Ancestral sampling and its deterministic relative, both of first order."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from imagen_jax.diffusion.grids import Grid
from imagen_jax.diffusion.rules import Denoised, Levels, Rule, SamplerState, each_example, needed
from imagen_jax.diffusion.steps import ddim_step, ddpm_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Rule):
    """Ancestral sampling (arXiv 2205.11487, appendix F)."""

    GRID: ClassVar[Grid] = Grid.TIME
    variance_interpolation: float  # of the variance, in [0, 1], see `steps.ddpm_step`

    @property
    def stochastic(self) -> bool:
        """Always."""
        return True

    def plan(self, log_snrs: Float[Array, " steps"]) -> Levels:
        """One call a level."""
        return Levels.of(log_snrs)

    def update(
        self, call: Levels, state: SamplerState, denoised: Denoised, noise: Array | None
    ) -> tuple[Array, Any]:
        """Draws from the posterior, of the learned variance where there is one."""
        learned = denoised.variance_interpolation
        gamma = self.variance_interpolation if learned is None else learned
        levels = each_example(call.log_snr, state.x), each_example(call.log_snr_next, state.x)
        return ddpm_step(state.x, denoised.x0, needed(noise), *levels, variance_interpolation=gamma), ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Rule):
    """First order; stochastic with eta > 0 (arXiv 2010.02502, equation 12)."""

    GRID: ClassVar[Grid] = Grid.TIME
    eta: float = 0.0  # in [0, 1]

    @property
    def stochastic(self) -> bool:
        """Where noise is put back."""
        return self.eta > 0.0

    def plan(self, log_snrs: Float[Array, " steps"]) -> Levels:
        """One call a level."""
        return Levels.of(log_snrs)

    def update(
        self, call: Levels, state: SamplerState, denoised: Denoised, noise: Array | None
    ) -> tuple[Array, Any]:
        """The DDIM step."""
        levels = each_example(call.log_snr, state.x), each_example(call.log_snr_next, state.x)
        return ddim_step(state.x, denoised.x0, noise, *levels, eta=self.eta), ()
