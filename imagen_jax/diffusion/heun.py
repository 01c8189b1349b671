"""Heun's method of EDM (arXiv 2206.00364, algorithms 1 and 2), for a variance-preserving process."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.diffusion.grids import Grid
from imagen_jax.diffusion.rules import Denoised, Rule, SamplerState, each_example
from imagen_jax.diffusion.steps import add_noise, ddim_step, heun_correction

# Nats of log-SNR. Heun's rule takes the slope for linear in σ/α; over a longer step (the first one of a grid
# that is uniform in time, or any from a level without signal) that is worse than no correction.
LONGEST_HEUN_STEP = 4.0


class _Calls(NamedTuple):
    step: Int[Array, "*calls"]
    log_snr: Float[Array, "*calls"]
    log_snr_next: Float[Array, "*calls"]  # level that the step reaches; of no use at the last call
    corrects: Bool[Array, "*calls"]  # whether this is a step's second call
    log_snr_start: Float[Array, "*calls"]  # second calls: where the step began; its end: no correction
    log_snr_churned: Float[Array, "*calls"]  # level after the step to which noise is put back


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(Rule):
    """Second order with two calls a step, one in the last; churn without bounds of the churned levels."""

    GRID: ClassVar[Grid] = Grid.KARRAS
    churn: float = 0.0  # S_churn: noise put back, shared among all steps
    churn_noise: float = 1.0  # S_noise, the standard deviation of the noise put back

    @property
    def stochastic(self) -> bool:
        """With churn."""
        return self.churn > 0.0

    def network_calls(self, steps: int) -> int:
        """Two a step, and one in the last."""
        return 2 * steps - 1

    def plan(self, log_snrs: Float[Array, " steps"]) -> _Calls:
        """Both calls of each step, one after the other."""
        count = len(log_snrs)
        following, steps = jnp.concatenate([log_snrs[1:], log_snrs[-1:]]), jnp.arange(count)
        # γ = min(S_churn/N, √2 − 1) raises σ/α by 1 + γ; never beyond the noisiest level, for which alone the
        # network may have been trained.
        gamma = min(self.churn / count, math.sqrt(2.0) - 1.0)
        churned = jnp.maximum(log_snrs - 2.0 * math.log1p(gamma), log_snrs[0])
        start = jnp.where(following - churned <= LONGEST_HEUN_STEP, churned, following)
        churned_next = jnp.concatenate([churned[1:], churned[-1:]])

        def pairs(first: Array, second: Array) -> Array:
            return jnp.stack([first, second], axis=1).reshape(-1)[:-1]

        return _Calls(
            step=pairs(steps, steps),
            log_snr=pairs(churned, following),
            log_snr_next=pairs(following, following),
            corrects=pairs(steps < 0, steps >= 0),
            log_snr_start=pairs(following, start),
            log_snr_churned=pairs(following, churned_next),
        )

    def update(
        self, call: _Calls, state: SamplerState, denoised: Denoised, noise: Array | None
    ) -> tuple[Array, Any]:
        """The Euler step at a step's first call, its correction (and churn) at the second."""
        x = state.x
        begin, level, reached, churned = (
            each_example(log_snr, x)
            for log_snr in (call.log_snr_start, call.log_snr, call.log_snr_next, call.log_snr_churned)
        )

        def predict() -> Array:
            return ddim_step(x, denoised.x0, None, level, reached, eta=0.0)

        def correct() -> Array:
            corrected = heun_correction(x, state.x0, denoised.x0, begin, level)
            return (
                corrected
                if noise is None
                else add_noise(corrected, self.churn_noise * noise, reached, churned)
            )

        return jax.lax.cond(call.corrects, correct, predict), ()
