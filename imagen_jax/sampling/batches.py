"""A batch of pictures through a stage's program, watched or not."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from imagen_jax.models.network import Params
from imagen_jax.sampling.inputs import StageInputs, not_finite, to_pixels
from imagen_jax.sampling.programs import StageProgram

_UPDATE_SECONDS = 0.5  # between two signs of life of a stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """What a batch looks like on its way."""

    stage: str
    call: int  # network calls made
    calls: int  # of so many
    pixels: np.ndarray  # uint8 (pictures, height, width, 3): x̂0 of the last call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watcher:
    """Who looks on."""

    progress: bool = False  # whether progress bars are shown
    preview: Callable[[Preview], None] | None = None  # called every half second with x̂0 as it forms


def run_batch(
    program: StageProgram,
    params: Params,
    inputs: StageInputs,
    count: int,
    *,
    progress: tqdm,
    preview: Callable[[Preview], None] | None,
) -> Float[np.ndarray, "count height width channels"]:
    """One batch from noise to x0: in one call, or in several where somebody watches. The result is the same.

    Args:
      program: of the stage.
      params: its parameters.
      inputs: of a whole batch.
      count: pictures of it that are wanted, the first ones.
      progress: is told of network calls.
      preview: called every half second with x̂0 as it forms; None: nobody looks.
    """
    given, state = program.place(inputs), program.empty_state()
    calls = program.spec.sampling.sampler.network_calls
    watched = not progress.disable or preview is not None
    done, chunk = 0, 1 if watched else calls
    while done < calls:
        stop, started = min(calls, done + chunk), time.perf_counter()
        state = jax.block_until_ready(program(params, given, state, done, stop))
        seconds = (time.perf_counter() - started) / (stop - done)
        progress.update(stop - done)
        done, chunk = stop, max(1, round(_UPDATE_SECONDS / max(seconds, 1e-6)))
        if preview is not None:
            x0 = np.asarray(state.x0)[:count]
            name = program.spec.stage.name
            shown_x0 = np.where(np.isfinite(x0), x0, np.float32(0.0))  # what is wrong is said when it is done
            preview(Preview(stage=name, call=done, calls=calls, pixels=to_pixels(shown_x0)))
    return np.asarray(state.x0)[:count]


def first_not_finite(
    program: StageProgram, params: Params, inputs: StageInputs, count: int
) -> Int[np.ndarray, " count"]:
    """The network call, from 1, at which each picture of a batch stops being finite; the last one where it does not.

    The batch is drawn once more, call by call: so nothing needs to be kept of the calls of good pictures.
    """
    given, state = program.place(inputs), program.empty_state()
    calls = program.spec.sampling.sampler.network_calls
    first = np.full(count, calls)
    for call in range(calls):
        state = program(params, given, state, call, call + 1)
        bad = not_finite(np.asarray(state.x0)[:count])
        first = np.where(bad, np.minimum(first, call + 1), first)
    return first
