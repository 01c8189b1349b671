"""Who judges the pictures of sample grids by their captions."""

from collections.abc import Callable

import numpy as np

from imagen_jax.data import shapes_captions
from imagen_jax.errors import UserError
from imagen_jax.evaluation import oracle
from imagen_jax.training.config import Scorer

# pictures uint8 (n, H, W, 3), the captions that they are drawn for → named figures
ScorePictures = Callable[[np.ndarray, list[str]], dict[str, float]]


def _oracle_score(pictures: np.ndarray, captions: list[str]) -> dict[str, float]:
    scores = oracle.score(list(pictures), captions)
    count = scores.pop("captions")
    return scores | {"fulfilled": scores["fulfilled"] / count}


SCORERS: dict[Scorer, ScorePictures] = {Scorer.ORACLE: _oracle_score}


def check_scorer(scorer: Scorer, resolution: int, captions: list[str]) -> None:
    """Raises UserError where pictures of that side, or of those captions, cannot be judged."""
    if scorer is not Scorer.ORACLE:
        return
    if resolution < oracle.MIN_RESOLUTION:
        raise UserError(
            f"config.train.sample_score=oracle reads pictures of {oracle.MIN_RESOLUTION} pixels and more; the "
            f"stage makes {resolution}"
        )
    for caption in captions:
        try:
            shapes_captions.parse(caption)
        except ValueError as error:
            raise UserError(
                f"config.train.sample_score=oracle knows the embedded data's captions only: {error}"
            ) from error
