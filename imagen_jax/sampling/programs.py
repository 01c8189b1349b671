"""Stages as compiled programs that outlive the process.

Nothing here imports the networks unless there is something to compile: where a program is stored they are not needed,
and importing them takes longer than loading it.
"""

import dataclasses
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagen_jax.config import to_dict
from imagen_jax.errors import UserError
from imagen_jax.executables import ProgramFile
from imagen_jax.files import json_object
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.network import Params
from imagen_jax.parallel.mesh import batch_sharding, replicated, state_shardings
from imagen_jax.parallel.spatial import picture_sharding
from imagen_jax.sampling.inputs import StageInputs

# The TPU compiler cuts the pictures of a small batch into strips to make a larger batch of them. By its own estimate
# that is half as fast as leaving them whole (docs/performance.md).
_TPU_OPTIONS: dict[str, str | bool] = dict.fromkeys(
    ("xla_tpu_run_space_to_batch", "xla_tpu_run_space_to_batch_on_new_platforms"), "false"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """What decides a stage's program, its weights apart."""

    stage: StageConfig
    sampling: SamplingConfig
    batch: int  # pictures drawn together
    negative: bool = False  # whether guidance leads away from a prompt rather than from the null text
    mesh: Mesh | None = None  # None: one device

    def file(self, cache: Path) -> ProgramFile:
        """Where the program is kept. The stage's own sampling settings have no say in it."""
        stage = {name: value for name, value in to_dict(self.stage).items() if name != "sampling"}
        mesh = None if self.mesh is None else [[name, int(size)] for name, size in self.mesh.shape.items()]
        if self.mesh is None:
            devices: tuple[jax.Device, ...] = (jax.local_devices()[0],)
            place: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(devices[0])
        else:
            devices = tuple(self.mesh.devices.flat)
            place = picture_sharding(self.mesh)
        results = tuple(
            jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=place) for each in self.arguments()[1]
        )
        return ProgramFile(
            folder=cache,
            description=[stage, to_dict(self.sampling), self.batch, self.negative, mesh],
            devices=devices,
            results=results,
        )

    def arguments(self) -> tuple[dict[str, jax.ShapeDtypeStruct], tuple[jax.ShapeDtypeStruct, ...]]:
        """Shapes of the inputs by name, and of the state."""
        stage, n = self.stage, self.batch
        length, channels = stage.max_text_length, stage.network.image_channels
        text = jax.ShapeDtypeStruct((n, length, stage.network.text_width), jnp.float32)
        mask = jax.ShapeDtypeStruct((n, length), jnp.bool_)
        inputs = {"seeds": jax.ShapeDtypeStruct((n,), jnp.uint32), "text": text, "mask": mask}
        if self.negative:
            inputs |= {"negative_text": text, "negative_mask": mask}
        if (low := stage.low_resolution) is not None:
            inputs["low_res"] = jax.ShapeDtypeStruct((n, low, low, channels), jnp.float32)
        picture = jax.ShapeDtypeStruct((n, stage.resolution, stage.resolution, channels), jnp.float32)
        return inputs, (picture, picture)

    def shardings(self, abstract_params: Params) -> tuple[Any, ...] | None:
        """Where parameters, inputs, state and the two call numbers lie; None without a mesh."""
        if self.mesh is None:
            return None
        inputs, _ = self.arguments()
        batch, whole = batch_sharding(self.mesh), replicated(self.mesh)
        pictures = picture_sharding(self.mesh)
        return (
            state_shardings(abstract_params, self.mesh),
            dict.fromkeys(inputs, batch),
            (pictures, pictures),
            whole,
            whole,
        )


class StageProgram:
    """A compiled stage: draws a batch from noise to pictures in one call, or in several, with the same result."""

    def __init__(self, spec: ProgramSpec, abstract_params: Params, compiled: Callable[..., Any]):
        self.spec, self.abstract_params, self._compiled = spec, abstract_params, compiled
        self._shardings = spec.shardings(abstract_params)

    @property
    def parameter_shardings(self) -> Any:
        """Where the program expects its parameters; None without a mesh."""
        return None if self._shardings is None else self._shardings[0]

    def place(self, inputs: StageInputs) -> dict[str, jax.Array]:
        """A batch of inputs on the devices."""
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        return jax.device_put(given, None if self._shardings is None else self._shardings[1])

    def empty_state(self) -> tuple[jax.Array, jax.Array]:
        """The state before the first call; what is in it is not looked at."""
        zeros = tuple(np.zeros(each.shape, each.dtype) for each in self.spec.arguments()[1])
        return jax.device_put(zeros, None if self._shardings is None else self._shardings[2])

    def __call__(
        self,
        params: Params,
        inputs: dict[str, jax.Array],
        state: tuple[jax.Array, jax.Array],
        first: int,
        last: int,
    ) -> tuple[jax.Array, jax.Array]:
        """(x, x̂0) after the network calls `first` to `last` − 1; the state given is used up."""
        numbers = (np.int32(first), np.int32(last))
        return self._compiled(params, inputs, state, *numbers)


def compile_program(lowered: jax.stages.Lowered, mesh: Mesh | None) -> jax.stages.Compiled:
    """Compiles a stage's program with the options that suit small batches on its devices.

    Args:
      lowered: the program.
      mesh: of the program; None: JAX's first device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "tpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=_TPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if not any(name in str(error) for name in _TPU_OPTIONS):
            raise
        return lowered.compile()  # a compiler that does not have them


def program_file(spec: ProgramSpec, cache: Path | None) -> ProgramFile | None:
    """Where a stage's program is kept; None: nowhere. Programs of several processes are left to JAX's own cache."""
    return None if cache is None or jax.process_count() > 1 else spec.file(cache)


def stored_params(file: ProgramFile) -> Params:
    """Shapes of the parameters that a stored program takes.

    Raises:
      UserError: the file says something else; names it.
    """
    where, found = f"{file.folder / 'programs' / file.key}: its note", {}
    for name, value in json_object(file.note, where).items():
        try:
            shape, dtype = value
            found[name] = jax.ShapeDtypeStruct(tuple(map(operator.index, shape)), jnp.dtype(dtype))
        except (TypeError, ValueError):
            raise UserError(
                f"{where} has {value!r} for {name}, no shape and dtype; delete the file"
            ) from None
    return found


def load_program(spec: ProgramSpec, file: ProgramFile) -> StageProgram | None:
    """A stage's program from its file; None if it is not there, or cannot be loaded."""
    stored = file.load()
    return None if stored is None else StageProgram(spec, stored_params(file), stored)


def prepare(spec: ProgramSpec, file: ProgramFile | None = None) -> StageProgram:
    """Traces and compiles a stage, or loads its program.

    Args:
      spec: what to compile.
      file: `program_file` of it; None: nothing is remembered.
    """
    if file is not None and (stored := load_program(spec, file)) is not None:
        return stored
    from imagen_jax.sampling.tracing import trace

    lowered, arguments = trace(spec)
    params = arguments[0]
    if file is None:
        return StageProgram(spec, params, compile_program(lowered, spec.mesh))
    note = {name: [each.shape, str(each.dtype)] for name, each in params.items()}
    made = file.make(lambda: compile_program(lowered, spec.mesh), arguments, note)
    return StageProgram(spec, params, made)
