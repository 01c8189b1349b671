"""The compiled training step. All randomness of an example is keyed by the seed and its own index."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt32

from imagen_jax.errors import UserError
from imagen_jax.models.network import Gather, Params
from imagen_jax.models.text_form import Text
from imagen_jax.parallel.mesh import batch_sharding, parameter_spec, replicated, works_locally
from imagen_jax.training.config import LoopConfig, OnNonfinite, TrainConfig
from imagen_jax.training.objectives import Batch, Losses
from imagen_jax.training.roles import Weights
from imagen_jax.training.run import Run
from imagen_jax.training.state import TrainState, ema_name, learning_rate, updates_done

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
    arrays = {name: value for name, value in batch.items() if name not in ("key", "caption", "tokens")}
    return arrays | {"index": split_index(batch["index"])}


# What a training step says of itself, the same on every device:
# loss () mean of the batch; grad_norm () before clipping; learning_rate () of this step;
# updated () bool, whether loss and gradient were finite and the parameters took the step;
# skipped () int32, steps of the run so far that were no update;
# bin_loss, bin_count (bins,) summed losses and number of the examples in each bin of log-SNR;
# tensor_squares (tensors,) of each parameter's gradient, in the order of `state.gradient_names`;
# losses (batch,) of each example, and index uint32 (batch, 2) of each, in the same order;
# these are the primary role's, and loss/ROLE and grad_norm/ROLE any other's that learns, 0 where it is not its turn
StepMetrics = dict[str, Array]


def ema_update(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """Ema + (1 − d)·(params − ema) with d = min(decay, (1 + step) / (10 + step)), a warm-up of the average."""
    done = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    return jax.tree.map(lambda old, new: old + (1.0 - d) * (new - old), ema, params)


def update_averages(ema: Params, params: Params, step: Array, config: LoopConfig) -> Params:
    """All averages of a run, each with its own decay; see `state.ema_name`."""
    updated = ema_update({name: ema[name] for name in params}, params, step, config.ema_decay)
    for decay in config.ema_decays:
        names = {name: ema_name(name, decay) for name in params}
        average = ema_update({name: ema[names[name]] for name in params}, params, step, decay)
        updated |= {names[name]: value for name, value in average.items()}
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
    run: Run, params: Weights, batch: Batch, null: Text, step: Array
) -> tuple[dict[str, Params], dict[str, Losses], UInt32[Array, "batch 2"]]:
    """Gradients by role of a batch's mean losses, its examples' losses, and their indices in the order of these.

    With `train.accumulate` the parts go through the networks one after the other and their gradients are added up;
    what an example draws is keyed by its index, so that the sum is the whole batch's but for rounding.
    """
    mesh = run.mesh
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.config.stage.network.gather is not Gather.ONCE or mesh.shape["tensor"] > 1 or devices == 1:
        return _gradients(run, params, batch, null, step)

    def specs(roles: Iterable[str]) -> dict[str, dict[str, P]]:
        shapes = {role: run.roles[role].network.abstract_params for role in roles}
        return jax.tree.map(lambda leaf: parameter_spec(leaf.shape, mesh), shapes)

    examples = P(("data", "fsdp"))
    gradients_of = jax.shard_map(
        functools.partial(_gradients, run),
        mesh=mesh,
        in_specs=(specs(run.roles), examples, P(), P()),
        out_specs=(specs(run.roles.learning), examples, examples),
        check_vma=False,  # gather_shard says how gradients are summed
    )
    return gradients_of(dict(params), dict(batch), null, step)


def _gradients(
    run: Run, params: Weights, batch: Batch, null: Text, step: Array
) -> tuple[dict[str, Params], dict[str, Losses], UInt32[Array, "batch 2"]]:
    """`batch_gradients`, of whole arrays or, where the code works locally, of one device's part of them."""
    mesh, parts = run.mesh, run.config.train.accumulate
    # Of all devices' means, each adds its share.
    share = 1 / (mesh.shape["data"] * mesh.shape["fsdp"]) if works_locally() else 1.0

    def of_role(role: str, part: Batch) -> tuple[Params, Losses]:
        def loss(learned: Params) -> tuple[Array, Losses]:
            losses = run.losses({**params, role: learned}, part, null)[role]
            return losses.loss.mean() * share, losses

        def gradient() -> tuple[Params, Losses]:
            return jax.grad(loss, has_aux=True)(params[role])

        if (every := run.roles[role].every) == 1:
            return gradient()
        idle = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient))
        return jax.lax.cond(step % every == 0, gradient, lambda: idle)

    def gradients_of(part: Batch) -> tuple[dict[str, Params], dict[str, Losses]]:
        both = {role: of_role(role, part) for role in run.roles.learning}
        return {role: pair[0] for role, pair in both.items()}, {role: pair[1] for role, pair in both.items()}

    if parts == 1:
        return *gradients_of(batch), batch["index"]

    def add(total: dict[str, Params], part: Batch) -> tuple[dict[str, Params], dict[str, Losses]]:
        gradients, losses = gradients_of(part)
        return jax.tree.map(lambda a, b: a + b / parts, total, gradients), losses

    split = split_batch(batch, parts, mesh)
    start = {role: jax.tree.map(jnp.zeros_like, params[role]) for role in run.roles.learning}
    total, losses = jax.lax.scan(add, start, split)
    flat = jax.tree.map(lambda x: x.reshape(-1), losses)
    return total, flat, split["index"].reshape(-1, 2)


def bin_losses(losses: Losses) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Sum of the losses, and number of the examples, in each bin of log-SNR (see `LOG_SNR_EDGES`)."""
    bins = jnp.searchsorted(jnp.asarray(LOG_SNR_EDGES), losses.log_snr, side="right")
    inside = bins[:, None] == jnp.arange(len(LOG_SNR_EDGES) + 1)[None]  # (N, bins)
    return jnp.where(inside, losses.loss[:, None], 0.0).sum(0), inside.astype(jnp.float32).sum(0)


def _updated(run: Run, state: TrainState, gradients: Mapping[str, Params]) -> TrainState:
    """The state after all roles that are due took their step."""
    params, ema, opt_state = dict(state.params), dict(state.ema), dict(state.opt_state)
    for role in run.roles.learning:
        weights = state.params[role]
        updates, stepped = run.optimizers[role].update(gradients[role], state.opt_state[role], weights)
        new: dict[str, Any] = {"params": optax.apply_updates(weights, updates), "opt_state": stepped}
        old: dict[str, Any] = {"params": weights, "opt_state": state.opt_state[role]}
        if role in ema:
            new["ema"] = update_averages(ema[role], new["params"], state.step, run.config.train)
            old["ema"] = ema[role]
        if (every := run.roles[role].every) > 1:
            due = state.step % every == 0
            new = jax.tree.map(lambda new, old, due=due: jnp.where(due, new, old), new, old)
        params[role], opt_state[role] = new["params"], new["opt_state"]
        if role in ema:
            ema[role] = new["ema"]
    return TrainState(state.step, params, ema, opt_state)


def make_train_step(run: Run) -> Callable[[TrainState, Batch, Text], tuple[TrainState, StepMetrics]]:
    """Compiles state, batch, null text → state, metrics; the old state's memory is reused.

    A step whose loss or gradient is not finite counts as a step but changes nothing else. Once more than
    `max_skipped` (0 where `on_nonfinite` is stop) of them were met, steps leave the state wholly as it is: it stays
    that before the offending step, though with its number, until the host has noticed.
    """
    loop, primary = run.config.train, run.roles.primary
    allowed = loop.max_skipped if loop.on_nonfinite is OnNonfinite.SKIP else 0
    optimizer = run.roles[primary].optimizer
    if optimizer is None:
        raise AssertionError("the primary role learns")
    rate = learning_rate(optimizer, loop.steps)

    def step(state: TrainState, batch: Batch, null: Text) -> tuple[TrainState, StepMetrics]:
        gradients, losses, index = batch_gradients(run, state.params, batch, null, state.step)
        squares = {
            role: jnp.stack([jnp.sum(jnp.square(gradient[name])) for name in sorted(gradient)])
            for role, gradient in gradients.items()
        }
        means = {role: values.loss.mean() for role, values in losses.items()}
        norms = {role: jnp.sqrt(values.sum()) for role, values in squares.items()}
        done = updates_done(state.opt_state[primary])
        running = state.step - done <= allowed
        finite = [jnp.isfinite(means[role]) & jnp.isfinite(norms[role]) for role in run.roles.learning]
        updated = functools.reduce(jnp.logical_and, finite) & running
        stepped = _updated(run, state, gradients)
        new = jax.tree.map(lambda new, old: jnp.where(updated, new, old), stepped, state)
        new = new._replace(step=state.step + running.astype(state.step.dtype))
        bin_loss, bin_count = bin_losses(losses[primary])
        metrics = {
            "loss": means[primary],
            "grad_norm": norms[primary],
            "learning_rate": jnp.asarray(rate(done.astype(jnp.float32)), jnp.float32),
            "updated": updated,
            "skipped": new.step - updates_done(new.opt_state[primary]),
            "bin_loss": bin_loss,
            "bin_count": bin_count,
            "tensor_squares": jnp.concatenate([squares[role] for role in run.roles.learning]),
            "losses": losses[primary].loss,
            "index": index,
        }
        for role in run.roles.learning:
            if role != primary:
                metrics |= {f"loss/{role}": means[role], f"grad_norm/{role}": norms[role]}
        return new, metrics

    return jax.jit(
        step,
        in_shardings=(run.shardings, batch_sharding(run.mesh), replicated(run.mesh)),
        out_shardings=(run.shardings, replicated(run.mesh)),
        donate_argnums=0,
    )
