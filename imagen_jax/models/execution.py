"""How a network's blocks are executed: rematerialised, scanned over, and their weights gathered one block at a time.

None of it changes what is computed, beyond rounding, nor the names and shapes of parameters: blocks that are
scanned over are stacked inside the step, so that checkpoints and safetensors do not know of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from imagen_jax.models.configs import Gather, Remat, UNetConfig
from imagen_jax.parallel.mesh import gather_weights

# Arrays that blocks give to their equals on the other side of a U: one each, or stacked along a first axis.
Twins = list[jax.Array] | jax.Array


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
    """Runs modules, alone or in a row."""

    mesh: Mesh | None = None  # on which the parameters lie by `parallel.mesh`; None: they lie whole
    gather: Gather = Gather.BLOCK  # ONCE: what is run has been gathered (`StageNetwork.apply` does it)
    remat: Remat = Remat.NONE
    scan: int = 0  # equal blocks in a row from which on they are one `lax.scan`, compiled once; 0: never
    dtype: jnp.dtype = jnp.dtype("float32")  # of the computation: matrices are gathered in it

    @classmethod
    def of(cls, config: UNetConfig, mesh: Mesh | None) -> "Execution":
        """How a network's blocks are run, on parameters that lie on `mesh`."""
        dtype = jnp.dtype(config.dtype)
        return cls(mesh=mesh, gather=config.gather, remat=config.remat, scan=config.scan, dtype=dtype)

    def _call(
        self, module: nnx.Module, scanned: bool, fixed: Mapping[str, Any]
    ) -> tuple[Any, Callable[..., Any]]:
        """The module's parameters and what it does as a function of them."""
        graph, state = nnx.split(module)

        def call(state: Any, *args: Any) -> Any:
            if self.mesh is not None and self.gather is Gather.BLOCK:
                state = gather_weights(state, self.mesh, dtype=self.dtype)
            return nnx.merge(graph, state)(*args, **fixed)

        if self.remat is Remat.NONE:
            return state, call
        policy = keep_products if self.remat is Remat.PRODUCTS else None
        # A scan's loop already keeps the compiler from merging both computations.
        return state, jax.checkpoint(call, policy=policy, prevent_cse=not scanned)

    def run_first(self, module: nnx.Module, *args: Any) -> Any:
        """`run` of a module that reads what the network is given, of which nothing is worth computing again."""
        return dataclasses.replace(self, remat=Remat.NONE).run(module, *args)

    def run(self, module: nnx.Module, *args: Any, **fixed: Any) -> Any:
        """`module(*args, **fixed)`; what is fixed is no array."""
        state, call = self._call(module, False, fixed)
        return call(state, *args)

    def chain(
        self,
        modules: Sequence[nnx.Module],
        x: jax.Array,
        *args: Any,
        twins: Twins | None = None,
        keep: bool = False,
        **fixed: Any,
    ) -> tuple[jax.Array, Twins]:
        """Runs modules one after the other, x through all of them.

        Args:
          modules: each maps x and `args` to the next x.
          x: what the first one gets.
          *args: what every one gets.
          twins: an array more for each module, its last argument, as the other side of a U has them: the first
            module gets the last one; None: there are none.
          keep: whether the modules' outputs are wanted.
          **fixed: keyword arguments that every one gets and that are no arrays.

        Returns:
          The last output, and all modules' outputs (nothing unless they are wanted).
        """
        outputs: list[jax.Array] = []
        start, count = 0, len(modules)
        while start < count:
            stop = start + 1
            while stop < count and _alike(modules, twins, start, stop):
                stop += 1
            if not self.scan or stop - start < self.scan:
                stop = start + 1
            own = None if twins is None else twins[count - stop : count - start]
            x, made = self._row(modules[start:stop], x, args, own, keep, fixed)
            if stop - start == count and not isinstance(made, list):
                return x, made
            outputs += list(made)
            start = stop
        return x, outputs

    def _row(
        self,
        modules: Sequence[nnx.Module],
        x: jax.Array,
        args: tuple,
        twins: Twins | None,
        keep: bool,
        fixed: Mapping[str, Any],
    ) -> tuple[jax.Array, Twins]:
        """The last output of equal modules, and all where they are wanted."""
        if len(modules) == 1:
            x = self.run(modules[0], x, *args, *(() if twins is None else (twins[0],)), **fixed)
            return x, [x] if keep else []
        _, call = self._call(modules[0], True, fixed)
        # Both in the order of the twins: the loop runs backwards over arrays that are not copied for it.
        backwards = twins is not None
        states = [nnx.split(module)[1] for module in (modules[::-1] if backwards else modules)]
        stacked = jax.tree.map(lambda *leaves: self._stack(leaves), *states)
        if isinstance(twins, list):
            twins = jnp.stack(twins)

        def body(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, jax.Array | None]:
            state, own = inputs
            x = call(state, x, *args, *(() if own is None else (own,)))
            return x, x if keep else None

        x, outputs = jax.lax.scan(body, x, (stacked, twins), reverse=backwards)
        if outputs is None:
            return x, []
        return x, outputs[::-1] if backwards else outputs

    def _stack(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """Matrices in the dtype of the computation: half the memory, and the loop has nothing to convert."""
        stacked = jnp.stack(leaves)
        return stacked.astype(self.dtype) if leaves[0].ndim > 1 else stacked


def _alike(modules: Sequence[nnx.Module], twins: Twins | None, first: int, other: int) -> bool:
    """Whether two modules differ in the values of their parameters only."""
    if twins is not None and twins[-1 - first].shape != twins[-1 - other].shape:
        return False
    states = [nnx.split(modules[index])[1] for index in (first, other)]
    shapes = [
        [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)] for state in states
    ]
    return type(modules[first]) is type(modules[other]) and shapes[0] == shapes[1]
