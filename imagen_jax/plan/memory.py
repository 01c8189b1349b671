"""What a stage keeps in each chip's memory, and whether it fits."""

import dataclasses
import math
import re
from typing import Any

import jax

from imagen_jax.training.state import TrainState

_OUT_OF_MEMORY = re.compile(r"\((\d+(?:\.\d+)?)([KMGT]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree's arrays on each device, by their shardings (which leave equal shards).

    Args:
      tree: `jax.ShapeDtypeStruct`s with shardings, or arrays.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device while the program runs."""

    params: int
    optimizer: int  # statistics; 0 when sampling
    ema: int  # averaged parameters; 0 when sampling
    batch: int  # this step's, and the next one's that is put there meanwhile; the result when sampling
    activations: int  # temporaries: activations, gradients, gathered weights; and padding of the above
    program: int  # the compiled code
    available: int  # of the chip's memory to a program

    @property
    def used(self) -> int:
        """All of it."""
        return self.params + self.optimizer + self.ema + self.batch + self.activations + self.program

    @property
    def left(self) -> int:
        """What remains; negative where it does not fit."""
        return self.available - self.used

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.left >= 0


def out_of_memory_bytes(message: str) -> int | None:
    """Bytes that a program needs, arguments included, from the TPU compiler's refusal; None for other errors."""
    match = _OUT_OF_MEMORY.search(message)
    return None if match is None else int(float(match.group(1)) * _UNITS[match.group(2)])


def program_bytes(stats: Any) -> int:
    """Bytes of a compiled program's arguments, results, temporaries and code, from its memory_analysis().

    A result that takes the place of an argument (a donated state) counts once.
    """
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def account(
    state: TrainState | dict[str, Any],
    batch: Any,
    *,
    total: int,
    program: int,
    prefetched: bool,
    available: int,
) -> Memory:
    """Splits what a compiled program needs into what it is for.

    Args:
      state: a training state, or the parameters to sample with; with shardings.
      batch: the program's other arguments, with shardings.
      total: bytes of the program as `program_bytes` or `out_of_memory_bytes` gives them.
      program: bytes of its code; 0 where unknown.
      prefetched: whether the next batch lies on the devices beside this one.
      available: bytes of a device.
    """
    if isinstance(state, TrainState):
        params, ema, optimizer = (
            bytes_per_device(each) for each in (state.params, state.ema, state.opt_state)
        )
    else:
        params, ema, optimizer = bytes_per_device(state), 0, 0
    inputs = bytes_per_device(batch)
    return Memory(
        params=params,
        optimizer=optimizer,
        ema=ema,
        batch=inputs * (2 if prefetched else 1),
        activations=max(0, total - params - optimizer - ema - inputs - program),
        program=program,
        available=available,
    )
