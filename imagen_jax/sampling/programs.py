"""Stages as compiled programs. JAX's compilation cache keeps them from one process to the next (`cache`)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagen_jax.diffusion.loop import Hook
from imagen_jax.diffusion.rules import SamplerState
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.network import Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated, state_shardings
from imagen_jax.parallel.spatial import picture_sharding
from imagen_jax.sampling.inputs import StageInputs
from imagen_jax.sampling.stage_sampler import sample_stage
from imagen_jax.sizes import Size

# The TPU compiler cuts the pictures of a small batch into strips to make a larger batch of them. By its own estimate
# that is half as fast as leaving them whole (docs/performance.md).
_TPU_OPTIONS: dict[str, str | bool] = dict.fromkeys(
    ("xla_tpu_run_space_to_batch", "xla_tpu_run_space_to_batch_on_new_platforms"), "false"
)


@dataclasses.dataclass(frozen=True)
class HookShapes:
    """Which hooks a program has, and the shapes of an example's arrays in them."""

    tree: Any = jax.tree.structure(())
    leaves: tuple[tuple[tuple[int, ...], str], ...] = ()  # shape and dtype, without the batch

    @classmethod
    def of(cls, hooks: Sequence[Hook]) -> "HookShapes":
        """Those of hooks whose arrays have an axis over pictures first."""
        leaves, tree = jax.tree.flatten(tuple(hooks))
        return cls(tree, tuple((np.shape(leaf)[1:], str(leaf.dtype)) for leaf in leaves))

    def batch(self, size: int) -> tuple[Hook, ...]:
        """Hooks of a batch, with shapes in place of arrays."""
        return jax.tree.unflatten(
            self.tree, [jax.ShapeDtypeStruct((size, *shape), dtype) for shape, dtype in self.leaves]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """What decides a stage's program, its weights apart."""

    stage: StageConfig
    sampling: SamplingConfig
    batch: int  # pictures drawn together
    negative: bool = False  # whether there is something that guidance leads away from
    picture: bool = False  # whether the way begins with pictures
    mesh: Mesh | None = None  # None: one device
    size: Size | None = None  # of the pictures; None: the stage's own
    hooks: HookShapes = HookShapes()

    def arguments(self) -> tuple[dict[str, Any], SamplerState]:
        """Shapes of the inputs by name, and of the state."""
        stage, n = self.stage, self.batch
        length, channels = stage.max_text_length, stage.network.image_channels
        text = jax.ShapeDtypeStruct((n, length, stage.network.text_width), jnp.float32)
        mask = jax.ShapeDtypeStruct((n, length), jnp.bool_)
        inputs: dict[str, Any] = {"seeds": jax.ShapeDtypeStruct((n,), jnp.uint32), "text": text, "mask": mask}
        if self.negative:
            inputs |= {"negative_text": text, "negative_mask": mask}
        size = self.size or stage.size
        if stage.low_resolution is not None:
            inputs["low_res"] = jax.ShapeDtypeStruct((n, *size.over(stage.scale), channels), jnp.float32)
        picture = jax.ShapeDtypeStruct((n, *size, channels), jnp.float32)
        if self.picture:
            inputs["picture"] = picture
        inputs["hooks"] = self.hooks.batch(n)
        rule = self.sampling.sampler.rule
        return inputs, jax.eval_shape(lambda x: SamplerState(x, x, rule.start(x)), picture)

    def shardings(self, abstract_params: Params) -> tuple[Any, ...] | None:
        """Where parameters, inputs, state and the two call numbers lie; None without a mesh."""
        if self.mesh is None:
            return None
        inputs, state = self.arguments()
        batch, whole = batch_sharding(self.mesh), replicated(self.mesh)
        pictures = picture_sharding(self.mesh)
        return (
            state_shardings(abstract_params, self.mesh),
            jax.tree.map(lambda _: batch, inputs),
            jax.tree.map(lambda _: pictures, state),
            whole,
            whole,
        )

    @property
    def kernel_mesh(self) -> Mesh:
        """Where the program runs: the network chooses its kernels by the devices."""
        return self.mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])


class StageProgram:
    """A compiled stage: draws a batch from noise to pictures in one call, or in several, with the same result."""

    def __init__(self, spec: ProgramSpec, abstract_params: Params, compiled: Callable[..., Any]):
        self.spec, self.abstract_params, self._compiled = spec, abstract_params, compiled
        self._shardings = spec.shardings(abstract_params)

    @property
    def parameter_shardings(self) -> Any:
        """Where the program expects its parameters; None without a mesh."""
        return None if self._shardings is None else self._shardings[0]

    def place(self, inputs: StageInputs) -> dict[str, Any]:
        """A batch of inputs on the devices."""
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        return jax.device_put(given, None if self._shardings is None else self._shardings[1])

    def empty_state(self) -> SamplerState:
        """The state before the first call; what is in it is not looked at."""
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.spec.arguments()[1])
        return jax.device_put(zeros, None if self._shardings is None else self._shardings[2])

    def __call__(
        self, params: Params, inputs: dict[str, Any], state: SamplerState, first: int, last: int
    ) -> SamplerState:
        """The state after the network calls `first` to `last` − 1; the state given is used up."""
        return self._compiled(params, inputs, state, np.int32(first), np.int32(last))


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


def trace(spec: ProgramSpec, network: StageNetwork) -> jax.stages.Lowered:
    """A stage's program, (params, inputs, state, first, last) → state, not compiled."""
    mesh = spec.kernel_mesh

    def advance(
        params: Params, inputs: dict[str, Any], state: SamplerState, first: Any, last: Any
    ) -> SamplerState:
        given = StageInputs(**inputs)
        return sample_stage(
            network, params, given, state, first, last, config=spec.sampling, size=spec.size, mesh=mesh
        )

    number = jax.ShapeDtypeStruct((), jnp.int32)
    shardings = spec.shardings(network.abstract_params)
    placing: dict[str, Any] = {}
    if shardings is not None:
        placing = {"in_shardings": shardings, "out_shardings": shardings[2]}
    jitted = jax.jit(advance, donate_argnums=2, **placing)
    return jitted.lower(network.abstract_params, *spec.arguments(), number, number)


def whole_way(spec: ProgramSpec, network: StageNetwork) -> Callable[[Params, dict[str, Any]], jax.Array]:
    """(params, inputs) → x̂0, from noise to pictures in one call: for planning."""
    mesh = spec.kernel_mesh

    def whole(params: Params, inputs: dict[str, Any]) -> jax.Array:
        given = StageInputs(**inputs)
        return sample_stage(network, params, given, None, config=spec.sampling, size=spec.size, mesh=mesh).x0

    return whole


def lower(spec: ProgramSpec, network: StageNetwork | None = None) -> jax.stages.Lowered:
    """The whole way from noise to pictures, not compiled: for planning and for reading what the compiler makes.

    The number of network calls is known to the compiler here.
    """
    network = network or StageNetwork(spec.stage)
    inputs, _ = spec.arguments()
    shardings, whole = spec.shardings(network.abstract_params), whole_way(spec, network)
    if shardings is None:
        return jax.jit(whole).lower(network.abstract_params, inputs)
    jitted = jax.jit(whole, in_shardings=shardings[:2], out_shardings=shardings[2].x0)
    return jitted.lower(network.abstract_params, inputs)


def prepare(spec: ProgramSpec) -> StageProgram:
    """Traces and compiles a stage."""
    network = StageNetwork(spec.stage)
    return StageProgram(spec, network.abstract_params, compile_program(trace(spec, network), spec.mesh))
