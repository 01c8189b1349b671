"""What a run reads: its pipeline, its batches on the devices, and what is looked at before any of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imagen_jax.data.pipeline import Batches, PipelineConfig, embedding_width, open_batches, record_count
from imagen_jax.data.records import KeyIndex
from imagen_jax.errors import UserError
from imagen_jax.models.text_form import Text, zero_text
from imagen_jax.parallel.mesh import DataShare, put_batch
from imagen_jax.training.config import Scorer, TrainConfig
from imagen_jax.training.online import OnlineText, TokenizedBatches
from imagen_jax.training.scorers import check_scorer
from imagen_jax.training.train_step import step_arrays

WHOLE_BATCH = DataShare(index=0, count=1)


def pipeline_config(config: TrainConfig) -> PipelineConfig:
    """The input pipeline that a training config asks for."""
    stage, data = config.stage, config.data
    return PipelineConfig(
        path=data.path,
        split=data.split,
        size=config.size,
        scale=None if stage.low_resolution is None else stage.scale,
        crop=stage.crop,
        max_text_length=stage.max_text_length,
        batch_size=data.batch_size,
        seed=config.seed,
        flip=data.flip,
        num_threads=data.num_threads,
        prefetch=data.prefetch,
    )


def check_data(config: TrainConfig, online: OnlineText | None) -> None:
    """Checks the records against the config before anything is compiled.

    Args:
      config: the run.
      online: the encoder that runs beside it, if there is one.

    Raises:
      UserError: if the split is smaller than a batch, the embeddings' width is not the network's, there are no
        held-out records, or the samples cannot be scored.
    """
    data = config.data
    null_text(config, online)
    if online is None:
        place = data.embeddings or data.path
        width, what = embedding_width(place), f"the embeddings in {place}"
    else:
        width, what = online.width, f"the embeddings of text encoder {data.text_encoder}"
    if width != config.stage.network.text_width:
        raise UserError(
            f"config.stage.network.text_width is {config.stage.network.text_width}, but {what} have width {width}: "
            "without --config.stage.network.text_width, and where the config file does not set it, it is theirs"
        )
    count = record_count(data.path, data.split)
    if count < data.batch_size:
        raise UserError(
            f"config.data.batch_size={data.batch_size}, but split {data.split!r} of {data.path} "
            f"holds only {count} records"
        )
    if data.embeddings is not None:
        KeyIndex(data.embeddings, data.split)
    if config.train.eval_every:
        record_count(data.path, config.train.eval_split)
    if config.train.sample_every and config.train.sample_score is not Scorer.NONE:
        captions = list(config.train.sample_prompts or sample_batch(config)["caption"])
        check_scorer(config.train.sample_score, min(config.size), captions)


def device_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, online: OnlineText | None = None
) -> dict[str, jax.Array]:
    """The arrays that the training step reads, on the mesh; record keys stay behind.

    Args:
      batch: from `open_batches`, or with an encoder from `TokenizedBatches`.
      mesh: where to.
      online: the encoder of the batch's tokens.
    """
    placed = put_batch(step_arrays(batch), mesh)
    if online is not None:
        placed["text"] = online.embed(batch["tokens"], batch["text_mask"])
    return placed


def _open_batches(config: TrainConfig, pipeline: PipelineConfig, **options: int) -> Batches:
    """The batches with what their text is made of."""
    data = config.data
    captions = data.text_encoder is not None
    return open_batches(pipeline, embeddings=data.embeddings, captions=captions, **options)


def training_batches(
    config: TrainConfig,
    online: OnlineText | None,
    examples: int,
    share: DataShare = WHOLE_BATCH,
    pipeline: PipelineConfig | None = None,
) -> Batches | TokenizedBatches:
    """Batches, or this process's share of them, from the given global count of examples on.

    Args:
      config: the run.
      online: the encoder that runs beside it, if there is one.
      examples: used before.
      share: of each batch.
      pipeline: None: that of the training.
    """
    batches = _open_batches(
        config,
        pipeline or pipeline_config(config),
        start_example=examples,
        process_index=share.index,
        process_count=share.count,
    )
    return batches if online is None else TokenizedBatches(batches, online, ahead=config.data.prefetch)


def whole_batch(config: TrainConfig, online: OnlineText | None, step: int) -> dict[str, Any]:
    """The batch of a step (from 1) with the examples of all processes, made anew; `text` is on the host."""
    examples = (step - 1) * config.data.batch_size
    with _open_batches(config, pipeline_config(config), start_example=examples) as batches:
        batch = dict(next(batches))
    if online is not None:
        batch["text"], batch["text_mask"] = online.encode(batch["caption"])
    return batch


def sample_batch(config: TrainConfig) -> dict[str, Any]:
    """The first examples of the split that sample grids are drawn for, with their captions."""
    split = config.train.sample_split or config.data.split
    count = min(config.train.sample_count, record_count(config.data.path, split))
    pipeline = dataclasses.replace(
        pipeline_config(config), split=split, shuffle=False, batch_size=count, crop=None
    )
    with open_batches(pipeline, embeddings=config.data.embeddings, captions=True) as batches:
        return dict(next(batches))


def online_text(config: TrainConfig, mesh: Mesh) -> OnlineText | None:
    """The encoder that runs beside the training, if the config asks for one."""
    if config.data.text_encoder is None:
        return None
    return OnlineText.load(
        config.data.text_encoder,
        dtype=config.data.text_dtype.value,
        form=config.stage.text_form,
        mesh=mesh,
    )


def null_text(config: TrainConfig, online: OnlineText | None) -> Text:
    """The null text of a run's stage, on the host.

    Raises:
      UserError: it is the embedding of a caption, and there is no encoder.
    """
    form, width = config.stage.text_form, config.stage.network.text_width
    if form.null_caption is None:
        return zero_text(form.length, width)
    if online is None:
        raise UserError(
            "config.stage.padded_text needs the embeddings of padding, which records do not hold; "
            "set config.data.text_encoder to the encoder's folder"
        )
    return online.null_text
