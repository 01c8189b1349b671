"""Compiles a stage's training step or its sampler for a slice that is not here."""

import dataclasses
import enum
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax.errors import UserError
from imagen_jax.models.network import Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.models.text_form import Text
from imagen_jax.parallel.jax_internals import get_topology_desc
from imagen_jax.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    replicated,
    with_shardings,
)
from imagen_jax.parallel.spatial import split_rows
from imagen_jax.plan.chips import Topology
from imagen_jax.plan.memory import out_of_memory_bytes
from imagen_jax.progress import elapsed
from imagen_jax.sampling.programs import ProgramSpec, compile_program, lower
from imagen_jax.training.config import TextDtype, TrainConfig
from imagen_jax.training.run import Run
from imagen_jax.training.state import TrainState
from imagen_jax.training.train_step import make_train_step

_OPERATION_OPTION = "xla_tpu_scoped_vmem_limit_kib"


class Program(enum.StrEnum):
    """What is planned."""

    TRAIN = "train"  # one training step
    SAMPLE = "sample"  # a batch of pictures, from noise to the last step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program for a mesh of chips that are not here."""

    mesh: Mesh
    network: StageNetwork
    state: TrainState | dict[str, Any]  # shapes with shardings; parameters alone when sampling
    batch: Any  # shapes with shardings of the other arguments
    program: Any | None  # None: the compiler refused it for want of memory
    needed_bytes: int | None  # of a refused program, on each chip
    seconds: float  # that lowering and compiling took


def slice_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, or of several, to make a mesh of and to compile for.

    Raises:
      UserError: if libtpu knows no such slice, naming --topology.
    """
    try:
        described = get_topology_desc(
            topology_name=topology.slice_name,
            platform="tpu",
            chip_config_name=topology.chip.config_name,
            **({"num_slices": topology.slices} if topology.slices > 1 else {}),
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology.slice_name}: the TPU compiler has no such slice: {reason}"
        ) from error
    if len(described.devices) != topology.count:
        raise UserError(
            f"--topology={topology.slice_name}: {topology.count} chips, but the TPU compiler makes "
            f"{len(described.devices)} devices of them"
        )
    return list(described.devices)


def training_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a training step reads, as `training.batches.device_batch` puts it on the mesh."""
    stage, n = config.stage, config.data.batch_size
    online32 = config.data.text_encoder is not None and config.data.text_dtype is TextDtype.FLOAT32
    size, channels = config.step_size, stage.network.image_channels
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((n, *size, channels), jnp.uint8),
        "text": (
            (n, stage.max_text_length, stage.network.text_width),
            jnp.float32 if online32 else jnp.bfloat16,
        ),
        "text_mask": ((n, stage.max_text_length), jnp.bool_),
        "index": ((n, 2), jnp.uint32),
    }
    if stage.low_resolution is not None:
        shapes["low_res"] = ((n, *size.over(stage.scale), channels), jnp.uint8)
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()
    }


def null_text(config: TrainConfig, mesh: Mesh) -> Text:
    """Shapes of the null text, as `training.batches.null_text` gives it."""
    length, width, place = config.stage.max_text_length, config.stage.network.text_width, replicated(mesh)
    return Text(
        jax.ShapeDtypeStruct((length, width), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((length,), jnp.bool_, sharding=place),
    )


def sampling_program(
    config: TrainConfig, network: StageNetwork, mesh: Mesh
) -> tuple[ProgramSpec, Params, dict[str, Any]]:
    """What decides the sampler's program, and shapes with shardings of its parameters and inputs."""
    spec = ProgramSpec(
        stage=config.stage,
        sampling=config.stage.sampling,
        batch=config.data.batch_size,
        negative=config.stage.sampling.guidance_weight != 1.0,
        mesh=mesh,
        size=config.size,
    )
    shardings = spec.shardings(network.abstract_params)
    if shardings is None:
        raise AssertionError("a program on a mesh has shardings")
    return (
        spec,
        with_shardings(network.abstract_params, shardings[0]),
        with_shardings(spec.arguments()[0], shardings[1]),
    )


def compile_stage(
    config: TrainConfig,
    devices: list[Any],
    program: Program,
    *,
    rows: int = 1,
    operation_kib: int | None = None,
    progress: bool = False,
) -> Compiled:
    """Compiles the very program that `train` or `sample` would run on the devices.

    Args:
      config: the stage, its mesh and `data.batch_size`, pictures over all devices.
      devices: of a slice.
      program: which of the two.
      rows: devices over which each picture's rows are split, when sampling.
      operation_kib: on-chip memory that one operation may use; less compiles faster, to a slower program than the one
        that `train` runs. None: libtpu's.
      progress: whether to show on stderr how long it has taken.

    Raises:
      UserError: for a mesh, rows or a batch that do not fit the devices, or a network that cannot be trained.
    """
    mesh = make_mesh(config.mesh, devices)
    if rows != 1:
        if program is Program.TRAIN:
            raise UserError(f"--rows={rows}: rows are split when sampling; add --program=sample")
        mesh = split_rows(mesh, rows)
    if program is Program.TRAIN:
        config.check_trainable()
    check_batch_size(config.data.batch_size, mesh, "--batch_size")
    network = StageNetwork(config.stage)
    state: TrainState | dict[str, Any]
    start = time.monotonic()
    with elapsed(f"compiling {config.stage.name} for {len(devices)} chips", enabled=progress, least=0.0):
        if program is Program.TRAIN:
            run = Run.of(config, mesh)
            state, batch = run.abstract, training_batch(config, mesh)
            step: Any = make_train_step(run)
            lowered = step.lower(state, batch, null_text(config, mesh))
        else:
            spec, state, batch = sampling_program(config, network, mesh)
            lowered = lower(spec, network)
        options: dict[str, str | bool] | None = None
        if operation_kib is not None:
            options = {_OPERATION_OPTION: str(operation_kib)}
        made, needed = _compile(lowered, mesh, program, options)
    return Compiled(
        mesh=mesh,
        network=network,
        state=state,
        batch=batch,
        program=made,
        needed_bytes=needed,
        seconds=time.monotonic() - start,
    )


def _compile(
    lowered: jax.stages.Lowered, mesh: Mesh, program: Program, options: dict[str, str | bool] | None
) -> tuple[Any | None, int | None]:
    """The program, or None and the bytes that it would need."""
    try:
        if program is Program.TRAIN:
            return lowered.compile(compiler_options=options), None
        return compile_program(lowered, mesh), None
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory_bytes(str(error))
        if needed is None:
            raise
        return None, needed
