"""The compiled training step. All randomness of an example is keyed by the seed and its own index."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt32

from imagen_jax.diffusion.losses import diffusion_loss
from imagen_jax.diffusion.process import diffuse
from imagen_jax.errors import UserError
from imagen_jax.models.network import Gather, Params
from imagen_jax.models.stage import StageNetwork, drop_text, unit_pictures
from imagen_jax.parallel.mesh import (
    batch_sharding,
    parameter_spec,
    replicated,
    state_shardings,
    works_locally,
)
from imagen_jax.training.config import LoopConfig, OnNonfinite, TrainConfig
from imagen_jax.training.state import TrainState, ema_name, learning_rate, updates_done

Batch = Mapping[str, Array]

# Nats; between them, below the first and above the last lie the bins of log-SNR whose losses are told apart.
LOG_SNR_EDGES = (-9.0, -6.0, -3.0, 0.0, 3.0, 6.0, 9.0)


def split_index(index: np.ndarray) -> np.ndarray:
    """Example indices int64 (N,) as low and high 32 bits, uint32 (N, 2): JAX runs without 64-bit types."""
    unsigned = index.astype(np.uint64)
    return np.stack([unsigned & np.uint64(0xFFFFFFFF), unsigned >> np.uint64(32)], axis=1).astype(np.uint32)


def step_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch that the training step reads, with indices as it takes them.

    Whatever a pipeline or an encoder adds to a batch is among them unless it is named here.
    """
    arrays = {name: each for name, each in batch.items() if name not in ("key", "caption", "tokens")}
    return arrays | {"index": split_index(batch["index"])}


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


class Losses(NamedTuple):
    """Of each example of a batch."""

    loss: Float[Array, " batch"]  # weighted as trained
    log_snr: Float[Array, " batch"]  # noise level at which it was measured


# What a training step says of itself, the same on every device:
# loss () mean of the batch; grad_norm () before clipping; learning_rate () of this step;
# updated () bool, whether loss and gradient were finite and the parameters took the step;
# skipped () int32, steps of the run so far that were no update;
# bin_loss, bin_count (bins,) summed losses and number of the examples in each bin of log-SNR;
# tensor_squares (tensors,) of each parameter's gradient, in the order of their sorted names;
# losses (batch,) of each example, and index uint32 (batch, 2) of each, in the same order
StepMetrics = dict[str, Array]


def example_losses(
    network: StageNetwork, config: TrainConfig, params: Params, batch: Batch, *, mesh: Mesh | None = None
) -> Losses:
    """Loss and noise level of each example of a batch.

    Args:
      network: the stage's network.
      config: the run.
      params: its parameters.
      batch: `image` uint8 (N, R, R, 3); `text` (N, L, D) and `text_mask` (N, L); `index` uint32 (N, 2); and for
        an SR stage `low_res` uint8 (N, r, r, 3); with padded_text `null_text` (N, L, D).
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
    dropped = draws.drop < config.train.text_dropout
    text, mask = batch["text"].astype(jnp.float32), batch["text_mask"]
    if stage.padded_text:
        text = jnp.where(dropped[:, None, None], batch["null_text"].astype(jnp.float32), text)
    else:
        text, mask = drop_text(text, mask, dropped)
    aug_log_snr = None
    if low_res is not None:
        level = draws.aug_level * stage.augmentation.max_level
        low_res = stage.augmentation.apply(low_res, draws.aug_noise, level)
        aug_log_snr = stage.augmentation.log_snr(level)
    output = network.apply(
        params, x_t, log_snr, text, mask, low_res=low_res, aug_log_snr=aug_log_snr, mesh=mesh
    )
    losses = diffusion_loss(
        output.prediction, x0=x0, x_t=x_t, log_snr=log_snr, prediction=stage.prediction, config=config.loss
    )
    return Losses(losses, log_snr)


def batch_loss(
    network: StageNetwork, config: TrainConfig, params: Params, batch: Batch, *, mesh: Mesh | None = None
) -> Float[Array, ""]:
    """Mean loss of a batch; the arguments are those of `example_losses`."""
    return example_losses(network, config, params, batch, mesh=mesh).loss.mean()


def ema_update(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """Ema + (1 − d)·(params − ema) with d = min(decay, (1 + step) / (10 + step)), a warm-up of the average."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - d) * (new - old), ema, params)


def update_averages(ema: Params, params: Params, step: Array, config: LoopConfig) -> Params:
    """All averages of a run, each with its own decay; see `state.ema_name`."""
    updated = ema_update({name: ema[name] for name in params}, params, step, config.ema_decay)
    for decay in config.ema_decays:
        names = {name: ema_name(name, decay) for name in params}
        own = ema_update({name: ema[names[name]] for name in params}, params, step, decay)
        updated |= {names[name]: value for name, value in own.items()}
    return updated


def check_accumulation(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless each part of an accumulated batch can be shared by the devices."""
    parts, devices = config.train.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % (parts * devices):
        raise UserError(
            f"config.train.accumulate={parts}: config.data.batch_size={config.data.batch_size} is not a multiple of "
            f"{parts} parts × {devices} devices that share a batch"
        )


def split_batch(batch: Batch, parts: int, mesh: Mesh) -> dict[str, Array]:
    """Arrays (N, …) as (parts, N / parts, …), each part having examples of every device: nothing is moved."""
    if works_locally():
        return {name: array.reshape(parts, -1, *array.shape[1:]) for name, array in batch.items()}
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, P(None, ("data", "fsdp")))

    def split(array: Array) -> Array:
        shared = array.reshape(devices, parts, -1, *array.shape[1:]).swapaxes(0, 1)
        parted = shared.reshape(parts, -1, *array.shape[1:])
        return jax.lax.with_sharding_constraint(parted, sharding)

    return {name: split(array) for name, array in batch.items()}


def batch_gradients(
    network: StageNetwork, config: TrainConfig, params: Params, batch: Batch, mesh: Mesh
) -> tuple[Params, Losses, UInt32[Array, "batch 2"]]:
    """Gradients of a batch's mean loss, its examples' losses, and their indices in the order of these.

    With `train.accumulate` the parts go through the network one after the other and their gradients are added up;
    what an example draws is keyed by its index, so that the sum is the whole batch's but for rounding.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.stage.network.gather is not Gather.ONCE or mesh.shape["tensor"] > 1 or devices == 1:
        return _gradients(network, config, params, batch, mesh)
    specs = {name: parameter_spec(value.shape, mesh) for name, value in network.abstract_params.items()}
    examples = P(("data", "fsdp"))
    run = jax.shard_map(
        lambda params, batch: _gradients(network, config, params, batch, mesh),
        mesh=mesh,
        in_specs=(specs, examples),
        out_specs=(specs, examples, examples),
        check_vma=False,  # gather_shard says how gradients are summed
    )
    return run(params, dict(batch))


def _gradients(
    network: StageNetwork, config: TrainConfig, params: Params, batch: Batch, mesh: Mesh
) -> tuple[Params, Losses, UInt32[Array, "batch 2"]]:
    """`batch_gradients`, of whole arrays or, where the code works locally, of one device's part of them."""
    # Of all devices' means, each adds its share.
    share = 1 / (mesh.shape["data"] * mesh.shape["fsdp"]) if works_locally() else 1.0

    def gradients_of(part: Batch) -> tuple[Params, Losses]:
        def loss(params: Params) -> tuple[Array, Losses]:
            losses = example_losses(network, config, params, part, mesh=mesh)
            return losses.loss.mean() * share, losses

        return jax.grad(loss, has_aux=True)(params)

    parts = config.train.accumulate
    if parts == 1:
        return *gradients_of(batch), batch["index"]

    def add(total: Params, part: Batch) -> tuple[Params, Losses]:
        gradients, losses = gradients_of(part)
        return jax.tree.map(lambda a, b: a + b / parts, total, gradients), losses

    split = split_batch(batch, parts, mesh)
    total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), split)
    flat = jax.tree.map(lambda each: each.reshape(-1), losses)
    return total, flat, split["index"].reshape(-1, 2)


def bin_losses(losses: Losses) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Sum of the losses, and number of the examples, in each bin of log-SNR (see `LOG_SNR_EDGES`)."""
    bins = jnp.searchsorted(jnp.asarray(LOG_SNR_EDGES), losses.log_snr, side="right")
    inside = bins[:, None] == jnp.arange(len(LOG_SNR_EDGES) + 1)
    return jnp.where(inside, losses.loss[:, None], 0.0).sum(0), inside.astype(jnp.float32).sum(0)


def compiler_options(config: LoopConfig, mesh: Mesh) -> dict[str, str] | None:
    """What the compiler is told of a training step; None: nothing."""
    if not config.tpu_operation_kib or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_tpu_scoped_vmem_limit_kib": str(config.tpu_operation_kib)}


def make_train_step(
    network: StageNetwork,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    state: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Compiles state, batch → state, metrics; the old state's memory is reused.

    A step whose loss or gradient is not finite counts as a step but changes nothing else. Once more than
    `max_skipped` (0 where `on_nonfinite` is stop) of them were met, steps leave the state wholly as it is: it stays
    that before the offending step, though with its number, until the host has noticed.

    Args:
      network: the stage's network.
      optimizer: as `make_optimizer` gives it.
      config: the run.
      mesh: where it runs.
      state: a state or its shapes.
    """
    allowed = config.train.max_skipped if config.train.on_nonfinite is OnNonfinite.SKIP else 0
    rate = learning_rate(config.optimizer, config.train.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        gradients, losses, index = batch_gradients(network, config, state.params, batch, mesh)
        squares = jnp.stack([jnp.sum(jnp.square(gradients[name])) for name in sorted(gradients)])
        loss, grad_norm = losses.loss.mean(), jnp.sqrt(squares.sum())
        done = updates_done(state.opt_state)
        running = state.step - done <= allowed
        updated = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & running

        def update(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = update_averages(state.ema, params, state.step, config.train)
            return TrainState(state.step, params, ema, opt_state)

        new = jax.tree.map(lambda new, old: jnp.where(updated, new, old), update(state), state)
        new = new._replace(step=state.step + running.astype(state.step.dtype))
        bin_loss, bin_count = bin_losses(losses)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(rate(done), jnp.float32),
            "updated": updated,
            "skipped": new.step - updates_done(new.opt_state),
            "bin_loss": bin_loss,
            "bin_count": bin_count,
            "tensor_squares": squares,
            "losses": losses.loss,
            "index": index,
        }
        return new, metrics

    shardings = state_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(config.train, mesh),
    )
