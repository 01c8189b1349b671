"""The compiled training step. All randomness of an example is keyed by the seed and its own index."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt32

from imagen_jax.diffusion.losses import diffusion_loss
from imagen_jax.diffusion.process import diffuse
from imagen_jax.models.stage import Params, StageNetwork, drop_text, unit_pictures
from imagen_jax.parallel.mesh import batch_sharding, replicated, state_shardings
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.state import TrainState

Batch = Mapping[str, Array]


class Draws(NamedTuple):
    """The random numbers of a batch; each example's depend on the seed and its index only."""

    time: Float[Array, " batch"]  # in [0, 1]
    noise: Float[Array, "batch height width channels"]
    drop: Float[Array, " batch"]  # in [0, 1]; the text is dropped below the dropout probability
    aug_level: Float[Array, " batch"]  # in [0, 1]
    aug_noise: Float[Array, "batch low_height low_width channels"]


def draw(
    key: Key[Array, ""], index: UInt32[Array, "batch 2"], shape: tuple[int, ...], low_shape: tuple[int, ...]
) -> Draws:
    """Draws for the examples of the given indices (low and high 32 bits)."""

    def one(parts: Array) -> Draws:
        own = jax.random.fold_in(jax.random.fold_in(key, parts[0]), parts[1])
        time, noise, drop, level, aug_noise = jax.random.split(own, 5)
        return Draws(
            jax.random.uniform(time),
            jax.random.normal(noise, shape),
            jax.random.uniform(drop),
            jax.random.uniform(level),
            jax.random.normal(aug_noise, low_shape),
        )

    return jax.vmap(one)(index)


def batch_loss(
    network: StageNetwork, config: TrainConfig, params: Params, batch: Batch, *, mesh: Mesh | None = None
) -> Float[Array, ""]:
    """Mean loss of a batch.

    Args:
      network: the stage's network.
      config: the run.
      params: its parameters.
      batch: `image` uint8 (N, R, R, 3); `text` (N, L, D) and `text_mask` (N, L); `index` uint32 (N, 2); and for
        an SR stage `low_res` uint8 (N, r, r, 3).
      mesh: where the parameters lie by the rules of `parallel.mesh`; None: they lie whole.
    """
    stage = config.stage
    x0 = unit_pictures(batch["image"])
    low_res = unit_pictures(batch["low_res"]) if stage.low_resolution else None
    if low_res is not None:
        low_res = stage.augmentation.prepare(low_res, x0.shape[1])
    low_shape = (0, 0, 3) if low_res is None else low_res.shape[1:]
    draws = draw(jax.random.key(config.seed), batch["index"], x0.shape[1:], low_shape)
    log_snr = stage.schedule.log_snr(draws.time)
    x_t = diffuse(x0, draws.noise, log_snr)
    text, mask = drop_text(
        batch["text"].astype(jnp.float32), batch["text_mask"], draws.drop < config.train.text_dropout
    )
    aug_log_snr = None
    if low_res is not None:
        level = draws.aug_level * stage.augmentation.max_level
        low_res = stage.augmentation.apply(low_res, draws.aug_noise, level)
        aug_log_snr = stage.augmentation.log_snr(level)
    output = network.apply(
        params, x_t, log_snr, text, mask, low_res=low_res, aug_log_snr=aug_log_snr, mesh=mesh
    )
    losses = diffusion_loss(
        output, x0=x0, x_t=x_t, log_snr=log_snr, prediction=stage.prediction, config=config.loss
    )
    return losses.mean()


def ema_update(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """Ema + (1 − d)·(params − ema) with d = min(decay, (1 + step) / (10 + step)), a warm-up of the average."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - d) * (new - old), ema, params)


def make_train_step(
    network: StageNetwork,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    state: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Compiles state, batch → state, {"loss", "grad_norm"}; the old state's memory is reused.

    Args:
      network: the stage's network.
      optimizer: as `make_optimizer` gives it.
      config: the run.
      mesh: where it runs.
      state: a state or its shapes.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss, gradients = jax.value_and_grad(
            lambda params: batch_loss(network, config, params, batch, mesh=mesh)
        )(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = ema_update(state.ema, params, state.step, config.train.ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    shardings = state_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
