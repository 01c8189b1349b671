"""Which text encoder made embeddings, told by what it does and not by what it is called.

Text encoders of the same width give arrays of the same shape and of another meaning. Their identity travels with
all that is made with them: record folders, work directories, checkpoints, model folders.
"""

import base64
import binascii
import dataclasses
import sys
from typing import Any

import numpy as np
from jaxtyping import Float

from imagen_jax.config import build, to_dict
from imagen_jax.errors import UserError

SKETCH_CHANNELS = 64  # channels of an embedding that a sketch keeps, at most
# Beyond so many times the median magnitude channels are clipped. T5 has a few channels tens of times larger than
# the others and much the same in all of its relatives: unclipped, they alone would decide.
_CLIP = 3.0
_STEPS = 42  # of the stored whole numbers, to one median
# Mean cosine of the sketches from which on they are of one encoder. 1 − cosine, measured on the small encoders of
# `text.small` and on T5s of 24 layers, random, with outlier channels: the same encoder in bfloat16 0.000005 and
# 0.00014, with weights rounded to int8 by row 0.00006 and 0.0013; another with weights moved by 5 % of their
# standard deviation 0.003 and 0.04, of another seed 1.
MIN_COSINE = 0.998


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """What tells a text encoder from others: equal for all copies of one, wherever they lie.

    Raises:
      ValueError: a sketch is not one.
    """

    width: int  # of one token's embedding
    tokenizer: str  # hash of its vocabulary and of the token ids of some texts
    sketches: tuple[str, ...]  # `sketch` of the embeddings of some texts, in base64

    def __post_init__(self):
        """Checks the sketches."""
        for each in self.sketches:
            if len(_unpacked(each)) != min(self.width, SKETCH_CHANNELS):
                raise ValueError(f"{each!r} is no sketch of an embedding of width {self.width}")

    def differences(self, other: "EncoderIdentity") -> str:
        """What tells the two encoders apart, in a few words; empty if they are the same."""
        if self.width != other.width:
            return f"width {self.width} and {other.width}"
        if self.tokenizer != other.tokenizer:
            return "their tokenizers differ"
        if len(self.sketches) != len(other.sketches):
            return "they were sketched with other texts"
        cosine = float(np.mean([_cosine(*pair) for pair in zip(self.sketches, other.sketches)] or [1.0]))
        return "" if cosine >= MIN_COSINE else f"their embeddings differ, cosine {cosine:.3f}"


def sketch(embedding: Float[np.ndarray, "width"]) -> str:
    """A few channels of an embedding, spread evenly, in units of their median magnitude, clipped and rounded.

    Raises:
      ValueError: a value is not finite.
    """
    if not np.isfinite(embedding).all():
        raise ValueError("the text embedding holds values that are not finite")
    scale = float(np.median(np.abs(embedding))) or float(np.abs(embedding).max()) or 1.0
    channels = np.linspace(0, len(embedding) - 1, min(len(embedding), SKETCH_CHANNELS)).round().astype(int)
    values = np.rint(np.clip(embedding[channels] / scale, -_CLIP, _CLIP) * _STEPS)
    return base64.b64encode(values.astype(np.int8).tobytes()).decode("ascii")


def _unpacked(text: str) -> Float[np.ndarray, "channels"]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), np.int8).astype(np.float64)
    except binascii.Error as error:
        raise ValueError(f"{text!r} is no sketch of an embedding ({error})") from None


def _cosine(one: str, other: str) -> float:
    a, b = _unpacked(one), _unpacked(other)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else float(not a.any() and not b.any())


def identity_from_json(content: Any, where: str) -> EncoderIdentity | None:
    """Reads what `identity_to_json` gave; None stays None.

    Raises:
      UserError: it is something else; names `where`.
    """
    return None if content is None else build(EncoderIdentity, content, where)


def identity_to_json(identity: EncoderIdentity | None) -> dict[str, Any] | None:
    """Plain JSON; None where the encoder is not known."""
    return None if identity is None else to_dict(identity)


def check_same_encoder(
    one: EncoderIdentity | None, other: EncoderIdentity | None, message: str, advice: str = ""
) -> None:
    """Refuses two encoders that are known and differ.

    Args:
      one: of what is there.
      other: of what is to go with it.
      message: what is wrong then; the difference follows in brackets.
      advice: what to do then; comes last.

    Raises:
      UserError: they differ.
    """
    difference = "" if one is None or other is None else one.differences(other)
    if difference:
        raise UserError(f"{message} ({difference}){advice}")


def warn_unknown_encoder(what: str) -> None:
    """Says on stderr that something does not say which text encoder it belongs to.

    Args:
      what: it, as the beginning of a sentence: "the records in X do".
    """
    print(
        f"warning: {what} not say which text encoder made the embeddings; whether it is the same as elsewhere "
        "cannot be checked",
        file=sys.stderr,
        flush=True,
    )
