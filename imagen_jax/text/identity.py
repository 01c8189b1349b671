"""What a text encoder does, as an identity: its tokenizer's vocabulary and ids, and the embeddings of fixed texts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from imagen_jax.data.encoder_identity import EncoderIdentity, sketch
from imagen_jax.errors import UserError

# What tokenizers differ in: case, accents, digits, punctuation, scripts, rare words, composed characters. Without
# white space at the ends or in a row, where the readers of one tokenizer's several files disagree.
_TOKENIZED = (
    "a small red circle left of a large blue square on a white background",
    "A photograph of Two Dogs and 3 cats asleep on a wooden bench, 1984.",
    "quixotic zeppelins & obsidian kiosks: 50% off! (don't ask why...)",
    "antidisestablishmentarianism, Llanfairpwllgwyngyll; x2y-7_z #tag @home",
    "Ein alter Leuchtturm im Nebel, l'été à la plage, niño, Øresund, žluťoučký",
    "一只白色的猫坐在红色的椅子上，旁边有3本书。",
    "красный круг, κόκκινος κύκλος, 赤い丸, 빨간 원, دائرة حمراء",
    "🐈 ½ ﬁne ① Ⅷ ™ “quoted” – dash",
    "",
)
# The ends and the means of their embeddings are sketched. In few tokens: one small batch.
_SKETCHED = (
    "a small red circle left of a large blue square",
    "two dogs and 3 cats asleep on a wooden bench",
    "an oil painting of a fox reading a newspaper",
    "一个蓝色的方形在白色背景上",
    "Ein alter Leuchtturm im Nebel",
    "quixotic zeppelins, 1984!",
)
_MAX_LENGTH = 128  # tokens; no text has as many
_DIGITS = 32


@runtime_checkable
class _Encoder(Protocol):
    """What an identity is made of."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def vocabulary(self) -> Mapping[str, int]: ...

    def tokenize(self, captions: Sequence[str], max_length: int) -> list[list[int]]: ...

    def encode(
        self, captions: Sequence[str], *, max_length: int, dtype: str | None
    ) -> Sequence[np.ndarray]: ...


def identify(encoder: _Encoder) -> EncoderIdentity:
    """The identity of an encoder: a few short texts are encoded.

    Raises:
      UserError: its embeddings are not finite.
    """
    embeddings = encoder.encode(_SKETCHED, max_length=_MAX_LENGTH, dtype="float32")
    try:
        sketches = [sketch(vector) for each in embeddings for vector in (each[-1], each.mean(axis=0))]
    except ValueError as error:
        raise UserError(f"text encoder {encoder.name}: {error}") from error
    return EncoderIdentity(width=encoder.width, tokenizer=_tokenizer_hash(encoder), sketches=tuple(sketches))


def _tokenizer_hash(encoder: _Encoder) -> str:
    """Of what a tokenizer does: the same for all files that one can be kept in."""
    # Special pieces (<pad>, <extra_id_7>) are listed by some files and not by others.
    pieces = sorted((i, piece) for piece, i in encoder.vocabulary.items() if not piece.startswith("<"))
    described = [pieces, encoder.tokenize(_TOKENIZED, _MAX_LENGTH)]
    return hashlib.sha256(json.dumps(described).encode("ascii")).hexdigest()[:_DIGITS]
