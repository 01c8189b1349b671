"""How a stage has its texts: what is done to a caption before it is encoded, how long it is, and what no caption is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from imagen_jax.limits import MAX_TEXT_LENGTH, check_numbers


class Text(NamedTuple):
    """Embeddings, and which of them count."""

    embeddings: Float[Any, "*batch length width"]
    mask: Bool[Any, "*batch length"]  # True for what attention sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextForm:
    """The form of a stage's texts."""

    length: int  # tokens; captions are padded or cut to it
    # Whether text is as DeepFloyd IF has it: captions in lower case, embeddings of padding count as text, and the
    # null text is the empty caption.
    padded: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"max_text_length must be at least 1, got {self.length}")
        check_numbers(self, length=MAX_TEXT_LENGTH)

    def normalise(self, caption: str) -> str:
        """The caption as the tokenizer gets it."""
        return caption.lower().strip() if self.padded else caption

    def mask(self, tokens: np.ndarray) -> Bool[np.ndarray, "batch length"]:
        """What of texts with so many tokens counts, int (batch,)."""
        return (np.arange(self.length) < tokens[:, None]) | self.padded

    def pad(self, rows: Sequence[Float[np.ndarray, "_ width"]], width: int) -> "Text":
        """Embeddings of captions, each of its own length, with zeros behind them: float32."""
        embeddings = np.zeros((len(rows), self.length, width), np.float32)
        for padded, row in zip(embeddings, rows, strict=True):
            padded[: len(row)] = row
        return Text(embeddings, self.mask(np.array([len(row) for row in rows], int)))

    @property
    def null_caption(self) -> str | None:
        """The caption that is the null text; None: it is none (`zero_text`)."""
        return "" if self.padded else None


def zero_text(length: int, width: int) -> Text:
    """The null text of classifier-free guidance where it is no caption: one token of zeros.

    arXiv 2205.11487, 2.2, zeroes the embeddings; with a single token that counts it does not depend on the length of
    the caption in whose place it is.
    """
    return Text(np.zeros((length, width), np.float32), np.arange(length) == 0)


def replace_text(text: Text, chosen: Bool[Array, " batch"], null: Text) -> Text:
    """Texts of a batch of which the chosen ones are the null text, (length, width)."""
    return Text(
        jnp.where(chosen[:, None, None], null.embeddings, text.embeddings),
        jnp.where(chosen[:, None], null.mask, text.mask),
    )
