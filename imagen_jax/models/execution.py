"""How a network's blocks are executed: rematerialised, scanned over, and their weights gathered one block at a time.

None of it changes what is computed, beyond rounding, nor the names and shapes of parameters: blocks that are
scanned over are stacked inside the step, so that checkpoints and safetensors do not know of it.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from imagen_jax.parallel.mesh import gather_weights


class Remat(enum.StrEnum):
    """What is kept of a block's forward pass for its backward pass."""

    NONE = "none"  # everything
    PRODUCTS = (
        "products"  # results of convolutions, matrix products and attention; the rest is computed again
    )
    BLOCK = "block"  # the block's input only; all of it is computed again


# Their results are dear to compute and small to keep; all else is memory traffic that is fused away.
_PRODUCTS = frozenset({"conv_general_dilated", "pallas_call"})


def keep_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """The `jax.checkpoint` policy of `Remat.PRODUCTS`; products with batch axes are plain attention's logits."""
    if primitive.name == "dot_general":
        return not params["dimension_numbers"][1][0]
    return primitive.name in _PRODUCTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Runs modules, alone or in a row."""

    mesh: Mesh | None = None  # on which the parameters lie by `parallel.mesh`; None: they lie whole
    remat: Remat = Remat.NONE
    scan: bool = False  # whether equal blocks in a row are one `lax.scan`: compiles once, not once a block
    dtype: jnp.dtype = jnp.dtype("float32")  # of the computation: matrices are gathered in it

    def _call(
        self, module: nnx.Module, scanned: bool, fixed: Mapping[str, Any]
    ) -> tuple[Any, Callable[..., Any]]:
        """The module's parameters and what it does as a function of them."""
        graph, state = nnx.split(module)

        def call(state: Any, *args: Any) -> Any:
            if self.mesh is not None:
                state = gather_weights(state, self.mesh, dtype=self.dtype)
            return nnx.merge(graph, state)(*args, **fixed)

        if self.remat is Remat.NONE:
            return state, call
        policy = keep_products if self.remat is Remat.PRODUCTS else None
        # A scan's loop already keeps the compiler from merging both computations.
        return state, jax.checkpoint(call, policy=policy, prevent_cse=not scanned)

    def run(self, module: nnx.Module, *args: Any, **fixed: Any) -> Any:
        """`module(*args, **fixed)`; what is fixed is no array."""
        state, call = self._call(module, False, fixed)
        return call(state, *args)

    def chain(
        self,
        modules: Sequence[nnx.Module],
        x: jax.Array,
        *args: Any,
        each: Sequence[jax.Array] | None = None,
        **fixed: Any,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Runs modules one after the other, x through all of them.

        Args:
          modules: each maps x and `args` to the next x.
          x: what the first one gets.
          *args: what every one gets.
          each: an array more for each module, its last argument; None: there is none.
          **fixed: keyword arguments that every one gets and that are no arrays.

        Returns:
          The last output, and the outputs of all modules.
        """
        outputs: list[jax.Array] = []
        start = 0
        while start < len(modules):
            stop = start + 1
            while self.scan and stop < len(modules) and _alike(modules, each, start, stop):
                stop += 1
            extra = None if each is None else each[start:stop]
            outputs += self._row(modules[start:stop], x, args, extra, fixed)
            x, start = outputs[-1], stop
        return x, outputs

    def _row(
        self,
        modules: Sequence[nnx.Module],
        x: jax.Array,
        args: tuple,
        each: Sequence[jax.Array] | None,
        fixed: Mapping[str, Any],
    ) -> list[jax.Array]:
        """Outputs of equal modules."""
        if len(modules) == 1:
            return [self.run(modules[0], x, *args, *(() if each is None else each), **fixed)]
        _, call = self._call(modules[0], True, fixed)
        states = [nnx.split(module)[1] for module in modules]
        stacked = jax.tree.map(lambda *leaves: self._stack(leaves), *states)
        extra = None if each is None else jnp.stack(each)

        def body(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
            state, own = inputs
            x = call(state, x, *args, *(() if own is None else (own,)))
            return x, x

        _, outputs = jax.lax.scan(body, x, (stacked, extra))
        return list(outputs)

    def _stack(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """Matrices in the dtype of the computation: half the memory, and the loop has nothing to convert."""
        stacked = jnp.stack(leaves)
        return stacked.astype(self.dtype) if leaves[0].ndim > 1 else stacked


def _alike(modules: Sequence[nnx.Module], each: Sequence[jax.Array] | None, first: int, other: int) -> bool:
    """Whether two modules differ in the values of their parameters only."""
    if each is not None and each[first].shape != each[other].shape:
        return False
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(modules[index])))
        for index in (first, other)
    ]
    return type(modules[first]) is type(modules[other]) and shapes[0] == shapes[1]
