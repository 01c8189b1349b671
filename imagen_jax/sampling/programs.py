"""Stages as compiled programs that outlive the process."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagen_jax.config import to_dict
from imagen_jax.diffusion.samplers import SamplerState
from imagen_jax.models.stage import Params, SamplingConfig, StageConfig, StageNetwork
from imagen_jax.parallel.mesh import batch_sharding, replicated, state_shardings
from imagen_jax.parallel.spatial import picture_sharding
from imagen_jax.sampling.cache import load_program, program_key, save_program
from imagen_jax.sampling.stage_sampler import StageInputs, draw

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

    def key(self) -> str:
        """Name of the program in the cache. The stage's own sampling settings have no say in it."""
        stage = {name: value for name, value in to_dict(self.stage).items() if name != "sampling"}
        mesh = None if self.mesh is None else {name: int(size) for name, size in self.mesh.shape.items()}
        return program_key([stage, to_dict(self.sampling), self.batch, self.negative, mesh])

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

    def function(self, network: StageNetwork) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(params, inputs, state, first, last) → state: `draw` in types that JAX can write to a file."""

        def advance(
            params: Params, inputs: dict[str, Any], state: tuple[Any, Any], first: Any, last: Any
        ) -> tuple[jax.Array, jax.Array]:
            given, before = StageInputs(**inputs), SamplerState(*state)
            after = draw(network, params, given, before, first, last, config=self.sampling, mesh=self.mesh)
            return after.x, after.x0

        return advance


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


def lower(spec: ProgramSpec, network: StageNetwork | None = None) -> jax.stages.Lowered:
    """The whole way from noise to pictures, not compiled: for planning and for reading what the compiler makes.

    The number of network calls is known to the compiler here.
    """
    network = network or StageNetwork(spec.stage)
    inputs, _ = spec.arguments()
    shardings = spec.shardings(network.abstract_params)

    def whole(params: Params, inputs: dict[str, Any]) -> jax.Array:
        given = StageInputs(**inputs)
        return draw(network, params, given, None, config=spec.sampling, mesh=spec.mesh).x0

    if shardings is None:
        return jax.jit(whole).lower(network.abstract_params, inputs)
    jitted = jax.jit(whole, in_shardings=shardings[:2], out_shardings=shardings[2][0])
    return jitted.lower(network.abstract_params, inputs)


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


def prepare(spec: ProgramSpec, cache: Path | None = None) -> StageProgram:
    """Traces and compiles a stage, or finds it in the cache.

    Args:
      spec: what to compile.
      cache: folder of `sampling.cache`, None: nothing is remembered.
    """
    key = spec.key()
    numbers = (jax.ShapeDtypeStruct((), jnp.int32),) * 2
    inputs, state = spec.arguments()
    stored = load_program(cache, key)
    if stored is None:
        network = StageNetwork(spec.stage)
        function = _jit(spec.function(network), spec, network.abstract_params)
        if cache is None:
            lowered = function.lower(network.abstract_params, inputs, state, *numbers)
            return StageProgram(spec, network.abstract_params, compile_program(lowered, spec.mesh))
        exported = jax.export.export(function)(network.abstract_params, inputs, state, *numbers)
        stored = bytes(exported.serialize())
        save_program(cache, key, stored)
    # Also where it was just written: the compiler must be given the same program in every process.
    exported = jax.export.deserialize(bytearray(stored))
    (params, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    abstract = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in params.items()}
    function = _jit(exported.call, spec, abstract)
    lowered = function.lower(abstract, inputs, state, *numbers)
    return StageProgram(spec, abstract, compile_program(lowered, spec.mesh))


def _jit(function: Callable[..., Any], spec: ProgramSpec, abstract_params: Params) -> Any:
    shardings = spec.shardings(abstract_params)
    if shardings is None:
        return jax.jit(function, donate_argnums=2)
    return jax.jit(function, in_shardings=shardings, out_shardings=shardings[2], donate_argnums=2)
