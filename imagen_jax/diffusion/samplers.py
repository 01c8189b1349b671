"""One loop from noise to data for all samplers.

All randomness of image i comes from its own key, so that a picture does not depend on its batch.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from imagen_jax.diffusion.grids import Grid, GridConfig
from imagen_jax.diffusion.schedules import Schedule
from imagen_jax.diffusion.steps import add_noise, ddim_step, ddpm_step, heun_correction
from imagen_jax.limits import MAX_STEPS, check_numbers


class Denoised(NamedTuple):
    """What a network with a learned variance sees in x_t."""

    x0: Float[Array, "batch *shape"]
    # Takes the place of `SamplerConfig.variance_interpolation`, for each pixel and channel; None: it does not.
    variance_interpolation: Float[Array, "batch *shape"] | None


# (x_t, log-SNR, number of the step from 0) → x̂0: guidance and thresholding included.
Denoiser = Callable[
    [Float[Array, "batch *shape"], Float[Array, ""], Int[Array, ""]], Float[Array, "batch *shape"] | Denoised
]

# Nats of log-SNR. Heun's rule takes the slope for linear in σ/α; over a longer step (the first one of a grid
# that is uniform in time, or any from a level without signal) that is worse than no correction.
LONGEST_HEUN_STEP = 4.0


class Sampler(enum.StrEnum):
    """The rule for one step."""

    DDPM = "ddpm"  # ancestral sampling, stochastic
    DDIM = "ddim"  # first order; stochastic with eta > 0
    DPMPP = "dpmpp"  # DPM-Solver++(2M), second order
    DPMPP_SDE = "dpmpp_sde"  # SDE-DPM-Solver++(2M), stochastic
    HEUN = "heun"  # Heun's method of EDM, second order; two network calls a step; stochastic with churn > 0


# Grids with which the samplers were published.
OWN_GRIDS = {
    Sampler.DDPM: Grid.TIME,
    Sampler.DDIM: Grid.TIME,
    Sampler.DPMPP: Grid.LOG_SNR,
    Sampler.DPMPP_SDE: Grid.LOG_SNR,
    Sampler.HEUN: Grid.KARRAS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a stage is sampled."""

    kind: Sampler = Sampler.DDPM  # how a step goes from one noise level to the next
    steps: int = 256  # levels of the grid; a step is one network call (heun: two, but one in the last step)
    grid: GridConfig | None = (
        None  # None: time for ddpm and ddim, log_snr for dpmpp, dpmpp_sde, karras for heun
    )
    # DDPM variance σ̃²^(1−γ)·σ_{t|s}²^γ: between the posterior's (γ = 0) and the forward step's (γ = 1).
    variance_interpolation: float = 0.2
    learned_variance: bool = True  # ddpm: that of a network which learned one takes the place of the above
    eta: float = 0.0  # DDIM: 0 deterministic, 1 the posterior's variance (arXiv 2010.02502, equation 16)
    churn: float = (
        0.0  # heun: S_churn of arXiv 2206.00364, algorithm 2: noise put back, shared among all steps
    )
    churn_noise: float = 1.0  # heun: S_noise, the standard deviation of the noise put back (EDM: 1 to 1.007)

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
        check_numbers(self, steps=MAX_STEPS, churn_noise=10.0)

    @property
    def network_calls(self) -> int:
        """Network calls a picture, each on the doubled batch when guided: steps; heun 2·steps − 1."""
        return 2 * self.steps - 1 if self.kind is Sampler.HEUN else self.steps

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise of their own, so that the first noise alone does not decide the picture."""
        match self.kind:
            case Sampler.DDIM:
                return self.eta > 0.0
            case Sampler.HEUN:
                return self.churn > 0.0
            case Sampler.DPMPP:
                return False
            case _:
                return True

    def log_snrs(self, schedule: Schedule) -> Float[Array, " steps"]:
        """Log-SNR of each step on the config's grid."""
        grid = self.grid or GridConfig(kind=OWN_GRIDS[self.kind])
        return grid.log_snrs(schedule, self.steps)


def image_noise(
    keys: Key[Array, " batch"], step: Array | int, shape: tuple[int, ...]
) -> Float[Array, "batch ..."]:
    """Unit Gaussian noise (batch, *shape) in float32, each image's from its own key and the step's number."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)


class Calls(NamedTuple):
    """What is known of each network call before the loop; arrays of length `network_calls`."""

    step: Int[Array, " calls"]  # number of the step
    log_snr: Float[Array, " calls"]  # level at which the network is called
    log_snr_next: Float[Array, " calls"]  # level that the step reaches; of no use at the last call
    weight: Float[Array, " calls"]  # dpmpp: of the last change of x̂0, 1/(2r); 0: a first-order step
    corrects: Array  # bool; heun: whether this is a step's second call
    log_snr_start: Float[Array, " calls"]  # heun, second calls: where the step began; its end: no correction
    log_snr_churned: Float[Array, " calls"]  # heun: level after the step to which noise is put back


def plan_calls(log_snrs: Float[Array, " steps"], config: SamplerConfig) -> Calls:
    """All calls over the grid's levels; the last one's x̂0 is the sample."""
    following = jnp.concatenate([log_snrs[1:], log_snrs[-1:]])
    steps = jnp.arange(config.steps)
    if config.kind is not Sampler.HEUN:
        # r = (last step's length)/(this step's length), in log-SNR (arXiv 2211.01095, algorithm 2). The last
        # step, to no noise at all, has no length: like the first one it is of first order.
        lengths = jnp.diff(log_snrs)
        weight = jnp.zeros(config.steps).at[1:-1].set(0.5 * lengths[1:] / lengths[:-1])
        return Calls(steps, log_snrs, following, weight, steps < 0, log_snrs, following)
    # γ = min(S_churn/N, √2 − 1) raises σ/α by 1 + γ; never beyond the noisiest level, for which alone the
    # network may have been trained.
    gamma = min(config.churn / config.steps, math.sqrt(2.0) - 1.0)
    churned = jnp.maximum(log_snrs - 2.0 * math.log1p(gamma), log_snrs[0])
    start = jnp.where(following - churned <= LONGEST_HEUN_STEP, churned, following)
    churned_next = jnp.concatenate([churned[1:], churned[-1:]])

    def pairs(first: Array, second: Array) -> Array:
        return jnp.stack([first, second], axis=1).reshape(-1)[:-1]

    return Calls(
        step=pairs(steps, steps),
        log_snr=pairs(churned, following),
        log_snr_next=pairs(following, following),
        weight=jnp.zeros(config.network_calls),
        corrects=pairs(steps < 0, steps >= 0),
        log_snr_start=pairs(following, start),
        log_snr_churned=pairs(following, churned_next),
    )


def _heun_half_step(x: Array, x0: Array, x0_before: Array, noise: Array, call: Calls) -> Array:
    """The Euler step at a step's first call, its correction (and churn) at the second."""
    start, level, reached, churned = (
        jnp.broadcast_to(each, x.shape[:1])
        for each in (call.log_snr_start, call.log_snr, call.log_snr_next, call.log_snr_churned)
    )
    predicted = ddim_step(x, x0, noise, level, reached, eta=0.0)
    corrected = heun_correction(x, x0_before, x0, start, level)
    return jnp.where(call.corrects, add_noise(corrected, noise, reached, churned), predicted)


def _next_x(
    x: Array, found: Denoised, x0_before: Array, noise: Array, call: Calls, config: SamplerConfig
) -> Array:
    """What the network sees at the next call."""
    x0, learned = found
    log_snr_t = jnp.broadcast_to(call.log_snr, x.shape[:1])
    log_snr_s = jnp.broadcast_to(call.log_snr_next, x.shape[:1])
    match config.kind:
        case Sampler.DDPM:
            gamma = config.variance_interpolation if learned is None else learned
            return ddpm_step(x, x0, noise, log_snr_t, log_snr_s, variance_interpolation=gamma)
        case Sampler.DDIM:
            return ddim_step(x, x0, noise, log_snr_t, log_snr_s, eta=config.eta)
        case Sampler.DPMPP:
            middle = x0 + call.weight * (x0 - x0_before)
            return ddim_step(x, middle, noise, log_snr_t, log_snr_s, eta=0.0)
        case Sampler.DPMPP_SDE:
            middle = x0 + call.weight * (x0 - x0_before)
            return ddpm_step(x, middle, noise, log_snr_t, log_snr_s, variance_interpolation=0.0)
        case Sampler.HEUN:
            return _heun_half_step(x, x0, x0_before, config.churn_noise * noise, call)


class SamplerState(NamedTuple):
    """Where a batch is on its way from noise to data, between two network calls."""

    x: Float[Array, "batch *shape"]  # what the network sees at the next call
    x0: Float[Array, "batch *shape"]  # x̂0 of the last call; zeros before the first


def start(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> SamplerState:
    """Noise of each image's own key, before the first network call."""
    x_1 = image_noise(keys, 0, shape)
    return SamplerState(x_1, jnp.zeros_like(x_1))


def advance(
    denoiser: Denoiser,
    state: SamplerState,
    *,
    keys: Key[Array, " batch"],
    schedule: Schedule,
    config: SamplerConfig,
    first: Int[Array, ""] | int = 0,
    last: Int[Array, ""] | int | None = None,
) -> SamplerState:
    """Network calls `first` to `last` − 1 in one loop with one network call an iteration.

    DDPM and DDIM as in arXiv 2205.11487, appendix F; DPM-Solver++(2M) and its SDE variant as in arXiv
    2211.01095, algorithm 2 and appendix; Heun and churn as in arXiv 2206.00364, algorithm 2 without bounds of
    the churned levels, for a variance-preserving process.

    Args:
      denoiser: gives x̂0 from x_t, its log-SNR and the step's number.
      state: after `first` calls.
      keys: one key an image; the image depends on its own key only.
      schedule: noise level as a function of time; it may end without any signal (a log-SNR of −100, say).
      config: sampler, grid and steps.
      first: number of the first call, from 0.
      last: number of the call before which to stop; None: all `config.network_calls` are made.

    Returns:
      The state after `last` calls. After all of them its x0 is the sample: no noise is added after the last
      network call, and the last step is of first order whatever the sampler.
    """
    calls = plan_calls(config.log_snrs(schedule), config)

    def iterate(number: Array, state: SamplerState) -> SamplerState:
        call = jax.tree.map(lambda each: each[number], calls)
        found = denoiser(state.x, call.log_snr, call.step)
        if not isinstance(found, Denoised):
            found = Denoised(found, None)
        noise = (
            image_noise(keys, call.step + 1, state.x.shape[1:])
            if config.stochastic
            else jnp.zeros_like(state.x)
        )
        return SamplerState(_next_x(state.x, found, state.x0, noise, call, config), found.x0)

    return jax.lax.fori_loop(first, config.network_calls if last is None else last, iterate, state)


def sample(
    denoiser: Denoiser,
    *,
    keys: Key[Array, " batch"],
    shape: tuple[int, ...],
    schedule: Schedule,
    config: SamplerConfig,
) -> Float[Array, "batch *shape"]:
    """Draws a batch from noise to data: `start`, then all calls of `advance`, whose arguments these are.

    Returns:
      The last x̂0, float32, (batch, *shape).
    """
    state = start(keys, shape)
    return advance(denoiser, state, keys=keys, schedule=schedule, config=config).x0
