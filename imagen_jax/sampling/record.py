"""What a PNG says of itself: everything that is needed to make it again."""

import dataclasses
from typing import Any

from etils import epath

import imagen_jax
from imagen_jax.config import build, differences, to_dict
from imagen_jax.diffusion.samplers import SamplerConfig
from imagen_jax.errors import UserError
from imagen_jax.files import exists, json_field
from imagen_jax.limits import MAX_SEED, MAX_SIDE, check_numbers
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.sampling.pictures import read_metadata

FORMAT = 1
_SINCE_EDITING = ("first_step", "resamplings", "jump")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage that the picture went through."""

    name: str
    identity: str  # hash of its network and weights
    sampling: SamplingConfig  # as it was used, flags included


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """How a picture was made."""

    prompt: str
    seed: int
    stages: tuple[StageRecord, ...]  # up to the one that made the picture, base first
    text_encoder: str  # hash of the encoder
    model: str  # the model folder, as it was called then
    negative_prompt: str | None = None
    size: tuple[int, ...] | None = None  # width and height in pixels; None: the last stage's own
    given: str | None = (
        None  # SHA-256 of the pixels, and of the mask, that it was made from; None: from noise alone
    )
    given_file: str | None = None  # where those were, as they were called then
    mask_file: str | None = None
    outpaint: tuple[int, ...] | None = None  # margins: left, top, right, bottom
    version: str = imagen_jax.__version__  # of this package
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        check_numbers(self, seed=MAX_SEED, size=MAX_SIDE)
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be width and height in pixels, got {self.size}")
        if not self.stages:
            raise ValueError("stages: a picture goes through one stage at least, got none")

    def to_metadata(self) -> dict[str, Any]:
        """JSON types, as `save_png` takes them."""
        values = to_dict(self)
        # What is not used is left out, as in records from before it was there.
        for name in ("size", "given", "given_file", "mask_file", "outpaint"):
            if values[name] is None:
                del values[name]
        for stage in values["stages"]:
            sampler = stage["sampling"]["sampler"]
            for field in dataclasses.fields(SamplerConfig):
                if field.name in _SINCE_EDITING and sampler[field.name] == field.default:
                    del sampler[field.name]
        return values

    def same_picture(self, metadata: dict[str, Any] | None) -> bool:
        """Whether the metadata are those of this very picture, wherever its model lay."""
        if metadata is None:
            return False
        places = dict.fromkeys(("model", "given_file", "mask_file"), "")
        return {**metadata, **places} == {**self.to_metadata(), **places}


def read_record(path: epath.PathLike, *, flag: str = "--like") -> PictureRecord:
    """How a PNG of `imagen-jax sample` was made.

    Args:
      path: of anybody's file, local or in the cloud.
      flag: that named it, for messages.

    Raises:
      UserError: if it is missing, is no PNG of this program, was written by a newer version, or does not say
        enough.
    """
    where = f"{flag} {path}"
    try:
        if not exists(path):
            raise UserError(f"{path}: there is no such file")
        metadata = read_metadata(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    if metadata is None:
        raise UserError(f"{where} does not say how it was made: it is not a PNG of imagen-jax sample")
    written = json_field(metadata, "format", int, where, default=FORMAT)
    if written > FORMAT:
        raise UserError(f"{where} has a record of format {written}; this version reads up to {FORMAT}")
    if "stages" not in metadata:
        raise UserError(f"{where} was made by a version that did not write its settings down")
    return build(PictureRecord, metadata, where)


def check_same_model(record: PictureRecord, stages: dict[str, str], text_encoder: str, model: str) -> None:
    """Refuses to make a picture again with another model.

    Args:
      record: of the picture.
      stages: hashes of the model's stages by name.
      text_encoder: hash of the model's encoder.
      model: what to call it.

    Raises:
      UserError: naming what differs.
    """
    made_with = {each.name: each.identity for each in record.stages} | {"text encoder": record.text_encoder}
    here = {name: stages.get(name) for name in made_with} | {"text encoder": text_encoder}
    other = [name for name, identity in made_with.items() if here[name] != identity]
    if other:
        raise UserError(
            f"--model {model} is not the model that made the picture ({record.model}): "
            f"{' and '.join(other)} differ{'s' * (len(other) == 1)}"
        )


def settings_differences(old: PictureRecord, new: PictureRecord) -> list[str]:
    """Lines "stage.field: old → new" for the sampling settings in which two pictures differ."""
    lines = []
    names = {each.name: each for each in new.stages}
    for each in old.stages:
        if each.name in names:
            lines += differences(to_dict(each.sampling), to_dict(names[each.name].sampling), each.name)
    return lines
