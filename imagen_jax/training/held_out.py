"""What a run sees of its own quality: the loss of held-out records, and pictures of fixed captions with a score."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from imagen_jax.data import shapes_captions
from imagen_jax.data.pipeline import Batch, Batches, PipelineConfig, record_count
from imagen_jax.errors import UserError
from imagen_jax.evaluation import oracle
from imagen_jax.files import make_folder
from imagen_jax.models.text_form import Text
from imagen_jax.parallel.mesh import replicated
from imagen_jax.sampling.pictures import grid, save_png
from imagen_jax.sampling.stage_sampler import StageSampler
from imagen_jax.training.config import Scorer
from imagen_jax.training.online import OnlineText, TokenizedBatches
from imagen_jax.training.run import Run
from imagen_jax.training.state import TrainState

# pictures uint8 (n, H, W, 3), the examples that they are drawn for, with captions and pictures → named figures
ScorePictures = Callable[[np.ndarray, Batch], dict[str, float]]


def _oracle_score(pictures: np.ndarray, examples: Batch) -> dict[str, float]:
    scores = oracle.score(list(pictures), examples["caption"])
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


class HeldOutLoss:
    """The loss of a fixed set of records, whole captions and noise fixed by index, under the averaged weights.

    Args:
      run: whose loss.
      pipeline: of the training.
      open_batches: opens this process's share of the batches of a pipeline, with what their text is made of.
      place: puts a batch onto the devices.
    """

    def __init__(
        self,
        run: Run,
        pipeline: PipelineConfig,
        open_batches: Callable[[PipelineConfig], Batches | TokenizedBatches],
        place: Callable[[Batch], Any],
    ):
        config = run.config
        count = record_count(config.data.path, config.train.eval_split)
        self._batches = min(config.train.eval_batches, -(-count // config.data.batch_size))
        self._pipeline = dataclasses.replace(
            pipeline, split=config.train.eval_split, shuffle=False, flip=False
        )
        self._open, self._place = open_batches, place
        self._run = run.evaluating()
        self._loss = jax.jit(
            lambda params, batch, null: self._run.losses(params, batch, null)[run.roles.primary].loss.mean(),
            out_shardings=replicated(run.mesh),
        )

    def __call__(self, state: TrainState, null: Text) -> dict[str, float]:
        """{"held_out_loss": mean over the set}; `null` is the null text."""
        params = self._run.averages(state)
        with self._open(self._pipeline) as batches:
            losses = [self._loss(params, self._place(next(batches)), null) for _ in range(self._batches)]
        return {"held_out_loss": float(np.mean(jax.device_get(losses)))}


class SampleGrid:
    """Pictures of the same captions and seeds, drawn now and then with the averaged weights.

    Args:
      run: whose denoiser draws.
      workdir: of the run.
      batch: the examples whose captions, and low-resolution pictures, are used.
      online: the encoder of their captions, if they hold no text.
      null: the null text.
    """

    def __init__(
        self,
        run: Run,
        workdir: epath.Path,
        batch: Batch,
        online: OnlineText | None,
        null: Text,
    ):
        config, self._run = run.config, run
        self._batch, self._scorer = dict(batch), config.train.sample_score
        if self._scorer is not Scorer.NONE:
            check_scorer(self._scorer, min(config.size), self._batch["caption"])
        if online is not None:
            self._batch["text"], self._batch["text_mask"] = online.encode(self._batch["caption"])
        count = len(self._batch["text_mask"])
        self._null = Text(*(np.broadcast_to(each, (count, *each.shape)) for each in null))
        self._seeds = np.arange(len(self._batch["text_mask"]), dtype=np.uint32)
        self._sampler = StageSampler(run.network, run.mesh)
        self._folder = workdir / "samples"

    def draw(self, state: TrainState) -> tuple[np.ndarray, dict[str, float]]:
        """Writes WORKDIR/samples/STEP.png; returns the grid, and the pictures' scores if the run asks for them.

        Raises:
          UserError: pictures are not finite.
        """
        pictures = self._sampler(
            self._run.average(state),
            seeds=self._seeds,
            text=self._batch["text"].astype(np.float32),
            mask=self._batch["text_mask"],
            low_res=self._batch.get("low_res"),
            size=self._run.config.size,
            negative=(self._null.embeddings, self._null.mask),
        )
        result = grid(list(pictures))
        if jax.process_index() == 0:
            save_png(make_folder(self._folder) / f"{int(state.step):08d}.png", result)
        if self._scorer is Scorer.NONE:
            return result, {}
        scores = SCORERS[self._scorer](pictures, self._batch)
        return result, {f"{self._scorer.value}/{name}": float(value) for name, value in scores.items()}
