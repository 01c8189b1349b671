"""A stage's network as pure functions of its parameters."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from imagen_jax.diffusion.process import time_condition
from imagen_jax.diffusion.schedules import DiscreteCosineSchedule, Schedule
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.execution import Execution
from imagen_jax.models.network import Gather, NetworkOutput, Params
from imagen_jax.models.weights import flatten_names
from imagen_jax.parallel.mesh import gather_shard, gather_weights, works_locally


def level_condition(schedule: Schedule, log_snr: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """The number in [0, 1000] by which a network is told a noise level: of a discrete schedule, its step's."""
    if isinstance(schedule, DiscreteCosineSchedule):
        return schedule.timestep(log_snr)
    return time_condition(log_snr)


class _Keys(nnx.Rngs):
    """The keys of `nnx.Rngs(key)`, counted in Python.

    flax counts with an array, and asks that tracer for a sharding which it does not have: seconds in a large network.
    """

    def __init__(self, key: Array):
        super().__init__()
        self.key, self.count = key, 0

    def params(self) -> Array:
        """The next key."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


class StageNetwork:
    """A stage's network as pure functions of its parameters, a flat dictionary of arrays."""

    def __init__(self, config: StageConfig):
        self.config = config
        self._graph, state = nnx.split(nnx.eval_shape(self._make, jax.random.key(0)))
        named, self._tree = flatten_names(state)
        dtype = jnp.dtype(config.network.param_dtype)
        self.abstract_params = {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in named.items()}

    def _make(self, key: Array) -> nnx.Module:
        return self.config.network.make(_Keys(key))

    def init(self, key: Array) -> Params:
        """Fresh parameters; to be called under `jax.jit` with output shardings."""
        fresh = flatten_names(nnx.split(self._make(key))[1])[0]
        return {name: leaf.astype(self.config.network.param_dtype) for name, leaf in fresh.items()}

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(shape.size for shape in self.abstract_params.values())

    def _gather(self, params: Params, mesh: Mesh) -> Params:
        """All parameters whole along "fsdp", in the dtype of the computation."""
        local, network = works_locally(), self.config.network

        def gather(name: str, value: Array) -> Array:
            dtype = None if network.runs_in_float32(name) else jnp.dtype(network.dtype)
            if local:
                return gather_shard(value, self.abstract_params[name].shape, mesh, dtype=dtype)
            return gather_weights(value, mesh, dtype=dtype)

        return {name: gather(name, value) for name, value in params.items()}

    def apply(
        self,
        params: Params,
        x_t: Float[Array, "batch height width channels"],
        log_snr: Float[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        *,
        low_res: Float[Array, "batch low_height low_width channels"] | None = None,
        aug_log_snr: Float[Array, " batch"] | None = None,
        mesh: Mesh | None = None,
    ) -> NetworkOutput:
        """What the network says, of the stage's prediction type.

        Args:
          params: as `init` gives them.
          x_t: noisy pictures.
          log_snr: their log signal-to-noise ratios.
          text: text embeddings.
          mask: True for real tokens.
          low_res: for an SR stage: the (augmented) low-resolution pictures.
          aug_log_snr: for an SR stage: their log signal-to-noise ratios.
          mesh: where `params` lie by the rules of `parallel.mesh`, to be gathered as `network.gather` says; None:
            they lie whole.
        """
        if mesh is not None and self.config.network.gather is Gather.ONCE:
            params = self._gather(params, mesh)
        state = jax.tree.unflatten(self._tree, [jnp.asarray(params[name]) for name in self.abstract_params])
        network = nnx.merge(self._graph, state)
        time, aug_time = level_condition(self.config.schedule, log_snr), None
        if aug_log_snr is not None:
            aug_time = level_condition(self.config.augmentation.schedule, aug_log_snr)
        with Execution.of(self.config.network, mesh).active():
            output = network(x_t, time, text, mask, low_res=low_res, aug_time=aug_time)
        if not self.config.network.learned_variance:
            return NetworkOutput(prediction=output)
        prediction, variance = jnp.split(output, 2, axis=-1)
        return NetworkOutput(prediction=prediction, variance=0.5 * (variance + 1.0))


def unit_pictures(pictures: Array) -> Float[Array, "..."]:
    """uint8 pixels as float32 in [−1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1.0
