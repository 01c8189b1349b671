"""DPM-Solver++ of third order: the multistep solver with three x̂0 (arXiv 2211.01095, appendix; 2206.00927, B.4)."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.diffusion.grids import Grid
from imagen_jax.diffusion.rules import Denoised, Levels, Rule, SamplerState, each_example
from imagen_jax.diffusion.steps import ddim_step

# Nats of log(α/σ). Below, the functions of a step's length are sums of so many terms: differences of near-equal
# numbers would leave float32 few digits.
_SHORT, _TERMS = 0.5, 8


class _Calls(NamedTuple):
    step: Int[Array, "*calls"]
    log_snr: Float[Array, "*calls"]
    log_snr_next: Float[Array, "*calls"]
    newer: Float[Array, "*calls"]  # weight of the change of x̂0 from the call before; 0: a first-order step
    older: Float[Array, "*calls"]  # and of the change before that; 0: a second-order step


def _tail(h: Float[Array, "*shape"], order: int) -> Float[Array, "*shape"]:
    """Σ_{n ≥ order} (−h)^n / n!, divided by h^(order − 1): the φ functions of the exponential integrators."""
    total, term = jnp.zeros_like(h), -h
    for n in range(1, order):
        term = term / (n + 1)
    for n in range(order, order + _TERMS):
        total, term = total + term, term * -h / (n + 1)
    return total * (-1.0) ** (order - 1)


def _phis(h: Float[Array, "*shape"]) -> tuple[Array, Array, Array]:
    """φ1 = e^−h − 1, φ2 = φ1/h + 1, φ3 = φ2/h − 1/2 at steps of length h > 0."""
    first = jnp.expm1(-h)
    second = jnp.where(h < _SHORT, _tail(h, 2), first / h + 1.0)
    return first, second, jnp.where(h < _SHORT, _tail(h, 3), second / h - 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP3M(Rule):
    """The last three x̂0 as a parabola in log(α/σ); it begins with steps of first and second order."""

    GRID: ClassVar[Grid] = Grid.LOG_SNR

    def plan(self, log_snrs: Float[Array, " steps"]) -> _Calls:
        """One call a level.

        With D0 = x̂0, its slope D1 and half its curvature D2, from divided differences in units of the step, the step
        is (σ_s/σ_t)·x − α_s·(φ1·D0 − φ2·D1 + 2·φ3·D2): a first-order step of D0 − (φ2/φ1)·D1 + (2·φ3/φ1)·D2. The
        authors' code leaves out the 2, with which alone the order is three (tests/diffusion/test_orders.py).
        """
        steps = len(log_snrs)
        newer, older = jnp.zeros(steps), jnp.zeros(steps)
        lengths = jnp.diff(log_snrs) / 2.0  # of the steps, in log(α/σ)
        first, second, third = _phis(lengths)
        slope, curve = -second / first, 2.0 * third / first  # of D1 and D2
        if steps > 2:  # the second step: D1 is the last change over its length, D2 is not known
            newer = newer.at[1].set(slope[1] * lengths[1] / lengths[0])
        if steps > 3:
            r0, r1 = lengths[1:-1] / lengths[2:], lengths[:-2] / lengths[2:]
            both = (slope[2:] * r0 + curve[2:]) / (r0 + r1)
            newer = newer.at[2:-1].set((slope[2:] + both) / r0)
            older = older.at[2:-1].set(-both / r1)
        return _Calls(*Levels.of(log_snrs), newer=newer, older=older)

    def start(self, x: Float[Array, "batch *shape"]) -> Array:
        """x̂0 of the call before the last one."""
        return jnp.zeros_like(x)

    def update(
        self, call: _Calls, state: SamplerState, denoised: Denoised, noise: Array | None
    ) -> tuple[Array, Array]:
        """A first-order step with the parabola's mean over the step."""
        mean = denoised.x0 + call.newer * (denoised.x0 - state.x0) + call.older * (state.x0 - state.memory)
        levels = each_example(call.log_snr, state.x), each_example(call.log_snr_next, state.x)
        return ddim_step(state.x, mean, noise, *levels, eta=0.0), state.x0
