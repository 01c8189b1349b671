"""What sample grids are drawn for: captions, their text and, of super-resolution stages, the pictures to enlarge."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from imagen_jax.data.encoder_identity import EncoderIdentity, check_same_encoder
from imagen_jax.errors import UserError
from imagen_jax.models.text_form import Text
from imagen_jax.parallel.jax_internals import process_allgather
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.training.batches import sample_batch
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.online import OnlineText
from imagen_jax.training.run_encoder import records_encoder

if TYPE_CHECKING:
    from imagen_jax.data.pipeline import Batch

PROMPTS, BASE = "config.train.sample_prompts", "config.train.sample_base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """Of a grid's pictures, in their order."""

    captions: list[str]
    text: Text
    low_res: np.ndarray | None  # uint8 (pictures, height, width, 3), of SR stages
    origin: str  # what the grid says of the pictures that it enlarges; "": it enlarges none


def check_sample_inputs(config: TrainConfig) -> None:
    """Looks, before a run starts, at what its sample grids need.

    Raises:
      UserError: pictures are to be enlarged and there are none for the prompts, or the model that is to draw them is
        missing or has no such stage; names the field.
    """
    loop, stage = config.train, config.stage
    if loop.sample_base is None:
        if loop.sample_prompts and stage.low_resolution is not None:
            raise UserError(
                f"{PROMPTS}: stage {stage.name!r} enlarges pictures of {stage.low_resolution} pixels, and for "
                f"prompts there are none; name a model that draws them with --{BASE}=MODEL"
            )
        return
    if stage.low_resolution is None:
        raise UserError(
            f"{BASE}={loop.sample_base}: stage {stage.name!r} is a base stage and enlarges nothing"
        )
    sizes = [each.resolution for each in ModelFolder(loop.sample_base).stages]
    if stage.low_resolution not in sizes:
        raise UserError(
            f"{BASE}={loop.sample_base}: its stages make {', '.join(map(str, sizes))} pixels, and stage "
            f"{stage.name!r} enlarges {stage.low_resolution}"
        )


def sample_inputs(
    config: TrainConfig, online: OnlineText | None, encoder: EncoderIdentity | None
) -> SampleInputs:
    """Prompts, or the first captions of the split with their pictures.

    Args:
      config: of the run.
      online: the encoder beside it, if there is one.
      encoder: the one that makes the run's text; None: not known.

    Raises:
      UserError: the prompts' encoder is missing or is another, or as `check_sample_inputs`.
    """
    check_sample_inputs(config)
    loop, stage = config.train, config.stage
    batch: Batch = {} if loop.sample_prompts else sample_batch(config)
    captions = list(loop.sample_prompts or batch["caption"])
    if online is not None:
        text = Text(*online.encode(captions))
    elif loop.sample_prompts:
        text = _encoded(config, encoder)
    else:
        text = Text(batch["text"].astype(np.float32), batch["text_mask"])
    if stage.low_resolution is None:
        return SampleInputs(captions=captions, text=text, low_res=None, origin="")
    if loop.sample_base is None:
        origin = f"true pictures of split {loop.sample_split or config.data.split!r}"
        return SampleInputs(captions=captions, text=text, low_res=batch["low_res"], origin=origin)
    low_res = _drawn(loop.sample_base, captions, config)
    return SampleInputs(captions=captions, text=text, low_res=low_res, origin=f"drawn by {loop.sample_base}")


def _encoded(config: TrainConfig, identity: EncoderIdentity | None) -> Text:
    """The prompts, by the encoder that made the records."""
    place = records_encoder(config.data.embeddings or config.data.path)
    try:
        encoder = TextEncoder.load(place)
    except UserError as error:
        raise UserError(f"{PROMPTS} need the records' text encoder: {error}") from error
    check_same_encoder(
        identity,
        encoder.identity,
        f"{PROMPTS}: text encoder {place} is not the one that made the run's text",
    )
    return encoder.encode_form(config.train.sample_prompts, config.stage.text_form)


def _drawn(model: str, captions: list[str], config: TrainConfig) -> np.ndarray:
    """The pictures to enlarge, number i with seed i, the same on every process."""
    # Only here: it is never needed by most runs.
    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.drawing import Drawing

    scale, until = config.stage.scale, config.stage.low_resolution
    size = config.size.over(scale)
    wanted = tuple((caption, seed) for seed, caption in enumerate(captions))
    drawing = Drawing(wanted=wanted, until=until, size=size)
    pictures = np.stack([picture.pixels for picture in Imagen.load(model).draw(drawing)])
    return np.asarray(process_allgather(pictures, tiled=False)).reshape(-1, *pictures.shape)[0]
