"""The training state: what a checkpoint has to hold beside the position in the data."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.models.stage import Params, StageNetwork
from imagen_jax.parallel.mesh import state_shardings
from imagen_jax.training.config import Decay, Optimizer, OptimizerConfig, TrainConfig


class TrainState(NamedTuple):
    """Arrays of a run; all sharded by the rules of `parallel.mesh`."""

    step: jax.Array  # () int32, optimizer steps done
    params: Params
    ema: Params  # exponential moving average of params
    opt_state: Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or half a cosine down to 0 at `steps`."""
    if config.decay is Decay.CONSTANT:
        after: optax.Schedule = optax.constant_schedule(config.learning_rate)
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
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )

    key = jax.random.key(config.seed)
    shardings = state_shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=shardings)(key)


def abstract_state(network: StageNetwork, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring onto any mesh."""

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

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
