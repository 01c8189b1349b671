"""What a run sees of its own quality: the loss of held-out records, and pictures of fixed captions with a score."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from imagen_jax.data.pipeline import Batch, Batches, PipelineConfig, record_count
from imagen_jax.files import make_folder
from imagen_jax.models.text_form import Text
from imagen_jax.parallel.mesh import replicated
from imagen_jax.sampling.captioned import captioned_grid, enlarged
from imagen_jax.sampling.pictures import save_png
from imagen_jax.sampling.stage_sampler import StageSampler
from imagen_jax.training.config import Scorer
from imagen_jax.training.online import TokenizedBatches
from imagen_jax.training.run import Run
from imagen_jax.training.sample_inputs import SampleInputs
from imagen_jax.training.scorers import SCORERS, check_scorer
from imagen_jax.training.state import TrainState


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
      inputs: what they are drawn for.
      null: the null text.
    """

    def __init__(self, run: Run, workdir: epath.Path, inputs: SampleInputs, null: Text):
        config, self._run, self._inputs = run.config, run, inputs
        self._scorer = config.train.sample_score
        if self._scorer is not Scorer.NONE:
            check_scorer(self._scorer, min(config.size), inputs.captions)
        count = len(inputs.captions)
        self._null = Text(*(np.broadcast_to(each, (count, *each.shape)) for each in null))
        self._seeds = np.arange(count, dtype=np.uint32)
        self._sampler = StageSampler(run.network, run.mesh)
        self._folder = workdir / "samples"

    def draw(self, state: TrainState) -> tuple[np.ndarray, dict[str, float]]:
        """Writes WORKDIR/samples/STEP.png; returns the grid, and the pictures' scores if the run asks for them.

        Raises:
          UserError: pictures are not finite.
        """
        inputs = self._inputs
        pictures = self._sampler(
            self._run.average(state),
            seeds=self._seeds,
            text=inputs.text.embeddings,
            mask=inputs.text.mask,
            low_res=inputs.low_res,
            size=self._run.config.size,
            negative=(self._null.embeddings, self._null.mask),
        )
        result = self._grid(int(state.step), pictures)
        if jax.process_index() == 0:
            save_png(make_folder(self._folder) / f"{int(state.step):08d}.png", result)
        if self._scorer is Scorer.NONE:
            return result, {}
        scores = SCORERS[self._scorer](pictures, inputs.captions)
        return result, {f"{self._scorer.value}/{name}": float(value) for name, value in scores.items()}

    def _grid(self, step: int, pictures: np.ndarray) -> np.ndarray:
        """With captions; of an SR stage what it enlarged is on the left of each picture."""
        inputs, cells, title = self._inputs, list(pictures), f"step {step}"
        if inputs.low_res is not None:
            height, title = pictures.shape[1], f"{title}; left what is enlarged, {inputs.origin}"
            cells = [
                np.concatenate([enlarged(low, height), picture], axis=1)
                for low, picture in zip(inputs.low_res, pictures, strict=True)
            ]
        return captioned_grid(cells, inputs.captions, title=title)
