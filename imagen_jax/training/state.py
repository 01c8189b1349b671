"""The training state: what a checkpoint has to hold beside the position in the data."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imagen_jax.models.network import Params
from imagen_jax.training.config import Decay, LoopConfig, Optimizer, OptimizerConfig


class TrainState(NamedTuple):
    """Arrays of a run; all sharded by the rules of `parallel.mesh`."""

    step: jax.Array  # () int32, steps done
    params: dict[str, Params]  # by role
    ema: dict[str, Params]  # exponential moving averages, of the roles that have some; see `average_of`
    opt_state: dict[str, Any]  # of the roles that learn


def stored_form(state: TrainState) -> TrainState:
    """The state as checkpoints hold it: of a single role its arrays themselves, as before there were roles."""
    if len(state.params) > 1:
        return state
    (role,) = state.params
    return TrainState(state.step, state.params[role], state.ema[role], state.opt_state[role])


def from_stored_form(stored: TrainState, like: TrainState) -> TrainState:
    """Undoes `stored_form`; `like` is a state of the same run, or its shapes."""
    if len(like.params) > 1:
        return stored
    (role,) = like.params
    return TrainState(stored.step, {role: stored.params}, {role: stored.ema}, {role: stored.opt_state})


def gradient_names(state: TrainState) -> list[str]:
    """Names of the arrays that have gradients, in the order of `tensor_squares` in a step's metrics."""
    several = len(state.params) > 1
    return [
        f"{role}/{name}" if several else name
        for role in sorted(state.opt_state)
        for name in sorted(state.params[role])
    ]


def ema_name(name: str, decay: float) -> str:
    """Name in `TrainState.ema` of a parameter's average with one of `train.ema_decays`.

    The average with `train.ema_decay` goes by the parameter's own name, as in a run without further ones: a
    checkpoint of such a run has the same arrays whatever this version adds.
    """
    return f"{name}@{decay!r}"


def start_ema(params: Params, decays: Sequence[float]) -> Params:
    """The averages of a fresh state: the parameters themselves, once and once more for each further decay."""
    return dict(params) | {ema_name(name, decay): value for decay in decays for name, value in params.items()}


def average_of(params: Params, ema: Params, config: LoopConfig, decay: float | None = None) -> Params:
    """The average of a role's parameters with a decay.

    Args:
      params: the role's.
      ema: its averages.
      config: the run's loop.
      decay: `ema_decay` (or None for it), one of `ema_decays`, or 0 for the parameters as they are.

    Raises:
      ValueError: the run keeps no such average.
    """
    if decay is None or decay == config.ema_decay:
        return {name: ema[name] for name in params}
    if decay in config.ema_decays:
        return {name: ema[ema_name(name, decay)] for name in params}
    if decay == 0.0:
        return params
    kept = ", ".join(str(each) for each in (config.ema_decay, *config.ema_decays))
    raise ValueError(f"no average with decay {decay}: the run keeps {kept}, and 0 for no average")


def updates_done(opt_state: Any) -> jax.Array:
    """Number of updates that the optimizer made, () int32: fewer than the steps where steps were skipped."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return counts[0][1]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, half a cosine down to 0 at `steps`, or peak · √(warm-up / step)."""
    if config.decay is Decay.CONSTANT:
        after: optax.Schedule = optax.constant_schedule(config.learning_rate)
    elif config.decay is Decay.INVERSE_SQRT:
        first = max(1, config.warmup_steps)  # `after` counts from the end of the warm-up
        offset = config.warmup_steps

        def after(count: Any) -> Any:
            return config.learning_rate * jnp.sqrt(first / jnp.maximum(first, count + offset))
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - config.warmup_steps))
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm followed by Adam or Adafactor (arXiv 2205.11487, appendix F)."""
    rate = learning_rate(config, steps)
    if config.kind is Optimizer.ADAM:
        update = optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        # Adafactor's own scaling by the parameter's size stays off: `rate` is the absolute step of [P].
        update = optax.adafactor(rate, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, update)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a (possibly abstract) state, unsharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
