"""What the benchmarks of drawn pictures share: the oracle's findings, picture by picture, and their differences."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.evaluation import oracle
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.quickstart import held_out_captions
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing

CHUNK = 64
ATTRIBUTES = ("background", "colour", "size", "shape")


def findings(
    model: Imagen, count: int, path: Path, sampling: dict[str, SamplingConfig] | None = None
) -> np.ndarray:
    """Draws held-out captions of one object, number i with seed i, and asks the oracle about each picture.

    Args:
      model: the cascade.
      count: of captions.
      path: keeps what is found on the way; a second call goes on from there.
      sampling: settings by stage name, instead of the stages' own.

    Returns:
      Whether each picture has each attribute of its caption, bool (count, attributes).
    """
    captions = held_out_captions(count, 1)
    found = np.load(path) if path.exists() else np.zeros((0, len(ATTRIBUTES)), bool)
    path.parent.mkdir(parents=True, exist_ok=True)
    for chunk in _chunks(len(found), captions):
        made = model.draw(Drawing(wanted=tuple(chunk), sampling=sampling or {}), batch_size=CHUNK)
        checks = [oracle.check(picture.pixels, picture.prompt) for picture in made]
        found = np.concatenate([found, [[each[name] for name in ATTRIBUTES] for each in checks]])
        np.save(path, found)
        print(f"{path.stem}: {len(found)} of {count} pictures", flush=True)
    return found[:count]


def _chunks(done: int, captions: Sequence[str]) -> Iterator[list[tuple[str, int]]]:
    wanted = list(zip(captions, range(len(captions)), strict=True))
    for start in range(done, len(wanted), CHUNK):
        yield wanted[start : start + CHUNK]


def percent(rows: np.ndarray) -> dict[str, float]:
    """Shares of the pictures with each attribute, and with all of them ("fulfilled"), in per cent."""
    return _named(100 * _with_all(rows).mean(0))


def compared(rows: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Mean differences rows − others in points, and their standard errors over the pairs."""
    points = 100 * (_with_all(rows) - _with_all(others))
    return {
        "difference": _named(points.mean(0)),
        "standard_error": _named(points.std(0) / math.sqrt(len(points))),
    }


def _with_all(rows: np.ndarray) -> np.ndarray:
    return np.column_stack([rows, rows.all(1)]).astype(float)


def _named(values: np.ndarray) -> dict[str, float]:
    return dict(zip((*ATTRIBUTES, "fulfilled"), np.round(values, 2).tolist(), strict=True))
