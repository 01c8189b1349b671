"""The training state: what a checkpoint has to hold beside the position in the data."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.models.network import Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import state_shardings
from imagen_jax.training.config import Decay, LoopConfig, Optimizer, OptimizerConfig, TrainConfig


class TrainState(NamedTuple):
    """Arrays of a run; all sharded by the rules of `parallel.mesh`."""

    step: jax.Array  # () int32, optimizer steps done
    params: Params
    ema: Params  # exponential moving averages of params; see `ema_of`
    opt_state: Any


def ema_name(name: str, decay: float) -> str:
    """Name in `TrainState.ema` of a parameter's average with one of `train.ema_decays`.

    The average with `train.ema_decay` goes by the parameter's own name, as in a run without further ones: a
    checkpoint of such a run has the same arrays whatever this version adds.
    """
    return f"{name}@{decay!r}"


def start_ema(params: Params, decays: Sequence[float]) -> Params:
    """The averages of a fresh state: the parameters themselves, once and once more for each further decay."""
    return dict(params) | {ema_name(name, decay): value for decay in decays for name, value in params.items()}


def ema_of(state: TrainState, config: LoopConfig, decay: float | None = None) -> Params:
    """The average of the parameters with a decay.

    Args:
      state: of the run.
      config: its loop.
      decay: `ema_decay` (or None for it), one of `ema_decays`, or 0 for the parameters as they are.

    Raises:
      ValueError: the run keeps no such average.
    """
    if decay is None or decay == config.ema_decay:
        return {name: state.ema[name] for name in state.params}
    if decay in config.ema_decays:
        return {name: state.ema[ema_name(name, decay)] for name in state.params}
    if decay == 0.0:
        return state.params
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


def init_state(
    network: StageNetwork, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> TrainState:
    """A fresh state, made shard by shard where it will live."""

    def init(key: jax.Array) -> TrainState:
        params = network.init(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, start_ema(params, config.train.ema_decays)),
            opt_state=optimizer.init(params),
        )

    key = jax.random.key(config.seed)
    shardings = state_shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=shardings)(key)


def state_of_params(
    params: Params, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> TrainState:
    """The state of step 0 of a run that starts from given parameters, which it averages from."""

    def init(params: Params) -> TrainState:
        # Copies: the training step reuses the memory of each of the state's arrays.
        ema = jax.tree.map(jnp.copy, start_ema(params, config.train.ema_decays))
        own = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), own, ema, optimizer.init(params))

    shardings = state_shardings(jax.eval_shape(init, params), mesh)
    return jax.jit(init, out_shardings=shardings)(params)


def abstract_state(
    network: StageNetwork,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema_decays: Sequence[float] = (),
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring onto any mesh.

    Args:
      network: the stage's network.
      optimizer: as `make_optimizer` gives it.
      mesh: where the state is to lie.
      ema_decays: `train.ema_decays` of the run.
    """

    def init(params: Params) -> TrainState:
        ema = start_ema(params, ema_decays)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))

    shapes = jax.eval_shape(init, network.abstract_params)
    shardings = state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a (possibly abstract) state, unsharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
