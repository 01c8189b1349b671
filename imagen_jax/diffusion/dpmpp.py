"""DPM-Solver++ of second order and its SDE variant (arXiv 2211.01095, algorithm 2 and appendix)."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.diffusion.grids import Grid
from imagen_jax.diffusion.rules import Denoised, Levels, Rule, SamplerState, each_example, needed
from imagen_jax.diffusion.steps import ddim_step, ddpm_step


class _Calls(NamedTuple):
    step: Int[Array, "*calls"]
    log_snr: Float[Array, "*calls"]
    log_snr_next: Float[Array, "*calls"]
    weight: Float[Array, "*calls"]  # of the last change of x̂0, 1/(2r); 0: a first-order step


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Rule):
    """Two steps' x̂0 make a second-order one, of the flow or of the SDE."""

    GRID: ClassVar[Grid] = Grid.LOG_SNR
    sde: bool = False

    @property
    def stochastic(self) -> bool:
        """The SDE's is."""
        return self.sde

    def plan(self, log_snrs: Float[Array, " steps"]) -> _Calls:
        """One call a level."""
        # r = (last step's length)/(this step's length), in log-SNR. The last step, to no noise at all, has no
        # length: like the first one it is of first order.
        lengths = jnp.diff(log_snrs)
        weight = jnp.zeros(len(log_snrs)).at[1:-1].set(0.5 * lengths[1:] / lengths[:-1])
        return _Calls(*Levels.of(log_snrs), weight=weight)

    def update(
        self, call: _Calls, state: SamplerState, denoised: Denoised, noise: Array | None
    ) -> tuple[Array, Any]:
        """A first-order step with x̂0 as it is expected in the middle of the step."""
        middle = denoised.x0 + call.weight * (denoised.x0 - state.x0)
        levels = each_example(call.log_snr, state.x), each_example(call.log_snr_next, state.x)
        if self.sde:
            return ddpm_step(state.x, middle, needed(noise), *levels, variance_interpolation=0.0), ()
        return ddim_step(state.x, middle, noise, *levels, eta=0.0), ()
