"""Stages as functions for the compiler: what `sampling.programs` compiles where nothing is stored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imagen_jax.diffusion.samplers import SamplerState
from imagen_jax.models.network import Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling.inputs import StageInputs
from imagen_jax.sampling.programs import ProgramSpec
from imagen_jax.sampling.stage_sampler import draw


def trace(spec: ProgramSpec) -> tuple[jax.stages.Lowered, tuple[Any, ...]]:
    """A stage's program, (params, inputs, state, first, last) → state, not compiled, and shapes of these arguments.

    All arguments are kept, whether or not the computation looks at them: the program is called without JAX.
    """
    network = StageNetwork(spec.stage)
    mesh = _mesh(spec)

    def advance(
        params: Params, inputs: dict[str, Any], state: tuple[Any, Any], first: Any, last: Any
    ) -> tuple[jax.Array, jax.Array]:
        given, before = StageInputs(**inputs), SamplerState(*state)
        after = draw(network, params, given, before, first, last, config=spec.sampling, mesh=mesh)
        return after.x, after.x0

    inputs, state = spec.arguments()
    number = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (network.abstract_params, inputs, state, number, number)
    shardings = spec.shardings(network.abstract_params)
    if shardings is None:
        jitted = jax.jit(advance, donate_argnums=2, keep_unused=True)
    else:
        jitted = jax.jit(
            advance, in_shardings=shardings, out_shardings=shardings[2], donate_argnums=2, keep_unused=True
        )
    return jitted.lower(*arguments), arguments


def lower(spec: ProgramSpec, network: StageNetwork | None = None) -> jax.stages.Lowered:
    """The whole way from noise to pictures, not compiled: for planning and for reading what the compiler makes.

    The number of network calls is known to the compiler here.
    """
    network = network or StageNetwork(spec.stage)
    inputs, _ = spec.arguments()
    shardings, mesh = spec.shardings(network.abstract_params), _mesh(spec)

    def whole(params: Params, inputs: dict[str, Any]) -> jax.Array:
        given = StageInputs(**inputs)
        return draw(network, params, given, None, config=spec.sampling, mesh=mesh).x0

    if shardings is None:
        return jax.jit(whole).lower(network.abstract_params, inputs)
    jitted = jax.jit(whole, in_shardings=shardings[:2], out_shardings=shardings[2][0])
    return jitted.lower(network.abstract_params, inputs)


def _mesh(spec: ProgramSpec) -> Mesh:
    """Where the program runs: the network chooses its kernels by the devices."""
    return spec.mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
