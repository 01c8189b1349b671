"""How a network's modules are executed: rematerialised, and their weights gathered one block at a time.

None of it changes what is computed, beyond rounding, nor the names and shapes of parameters. It is said once, around
the network's call, and asked for where modules run: `Execution.current()`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from imagen_jax.models.network import Gather, NetworkConfig, Remat
from imagen_jax.parallel.mesh import gather_weights

# Their results are dear to compute or small to keep ("name": what attention gives, and statistics); all else is
# memory traffic, which is fused away.
_PRODUCTS = frozenset({"conv_general_dilated", "name"})


def keep_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """The `jax.checkpoint` policy of `Remat.PRODUCTS`; products with batch axes are plain attention's logits."""
    if primitive.name == "dot_general":
        return not params["dimension_numbers"][1][0]
    return primitive.name in _PRODUCTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Runs the modules of a network."""

    mesh: Mesh | None = None  # on which the parameters lie by `parallel.mesh`; None: they lie whole
    gather: Gather = Gather.BLOCK  # ONCE: what is run has been gathered (`StageNetwork.apply` does it)
    remat: Remat = Remat.NONE
    dtype: jnp.dtype = jnp.dtype("float32")  # of the computation: matrices are gathered in it

    @classmethod
    def of(cls, config: NetworkConfig, mesh: Mesh | None) -> "Execution":
        """How a network's modules are run, on parameters that lie on `mesh`."""
        return cls(mesh=mesh, gather=config.gather, remat=config.remat, dtype=jnp.dtype(config.dtype))

    @classmethod
    def current(cls) -> "Execution":
        """The one that is active; outside of any, modules run as they are."""
        return _current.get()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, and on this thread, `current` is this one."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def in_float32(self) -> "Execution":
        """The same, for modules that compute in float32 whatever the network's dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype("float32"))

    def run(self, module: nnx.Module, *args: Any) -> Any:
        """`module(*args)`."""
        graph, state = nnx.split(module)

        def call(state: Any, *args: Any) -> Any:
            if self.mesh is not None and self.gather is Gather.BLOCK:
                state = gather_weights(state, self.mesh, dtype=self.dtype)
            return nnx.merge(graph, state)(*args)

        if self.remat is not Remat.NONE:
            call = jax.checkpoint(call, policy=keep_products if self.remat is Remat.PRODUCTS else None)
        return call(state, *args)

    def run_first(self, module: nnx.Module, *args: Any) -> Any:
        """`run` of a module that reads what the network is given, of which nothing is worth computing again."""
        return dataclasses.replace(self, remat=Remat.NONE).run(module, *args)


_PLAIN = Execution()
_current: contextvars.ContextVar[Execution] = contextvars.ContextVar("execution", default=_PLAIN)
