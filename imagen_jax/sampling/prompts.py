"""Prompts as embeddings: each is encoded once, and alone."""

import collections
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from imagen_jax.errors import CutTextWarning, UnknownTokensWarning, UserError
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.text_form import Text, TextForm
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.store import WHOLE_LENGTH
from imagen_jax.text.tokenizer import CaptionTokenizer

MEMORY_BYTES = 2**28  # of embeddings that are kept
_SHOWN_PROMPT, _SHOWN_REST = 60, 200  # letters of a prompt, and of what is left out of it, in a warning


def prompt_warnings(
    tokenizer: CaptionTokenizer, prompts: Iterable[str], stages: Sequence[StageConfig]
) -> list[UserWarning]:
    """What of prompts the stages do not see: words unknown to the text encoder, and ends that are cut off.

    Args:
      tokenizer: of the text encoder.
      prompts: any texts; those that occur again are passed over.
      stages: that draw them.

    Returns:
      `UnknownTokensWarning`s and `CutTextWarning`s, each a line, in the order of the prompts.
    """
    shortest = min(map(_text_length, stages))
    found: list[UserWarning] = []
    for prompt in dict.fromkeys(prompts):
        shown = _shown(prompt, _SHOWN_PROMPT)
        words = tokenizer.unknown_words(prompt)
        if words:
            unknown = _shown(", ".join(words), _SHOWN_REST)
            found.append(
                UnknownTokensWarning(f"prompt {shown!r}: words unknown to the text encoder: {unknown}")
            )
        if rest := tokenizer.left_out(prompt, shortest):
            cutting = [each for each in stages if tokenizer.left_out(prompt, _text_length(each))]
            names = " and ".join(stage.name for stage in cutting)
            found.append(
                CutTextWarning(
                    f"prompt {shown!r} is cut to the {shortest} tokens of {names}; left out: "
                    f"{_shown(rest, _SHOWN_REST)!r}"
                    f"{' (an unknown word takes a token a letter or more)' if words and tokenizer.spells else ''}"
                )
            )
    return found


def _text_length(stage: StageConfig) -> int:
    return min(stage.max_text_length, WHOLE_LENGTH)


def _shown(text: str, letters: int) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= letters else f"{line[: letters - 1]}…"


def check_prompt(text: object, name: str = "prompt") -> None:
    """Refuses what is no text that a tokenizer, a file's name and a record can take.

    Args:
      text: the prompt.
      name: what to call it in messages.

    Raises:
      UserError: it is no string, or holds half a character (a lone surrogate).
    """
    if not isinstance(text, str):
        raise UserError(f"the {name} must be a text, got {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the {name} holds half a character (a lone surrogate) at character {error.start + 1}"
        ) from None


class PromptEncoder:
    """A text encoder that remembers what it encoded and can be put away in between.

    A prompt is encoded in a batch of its own: in a larger one its embedding would depend, by a rounding error, on
    the prompts beside it, and so would the picture.
    """

    def __init__(self, encoder: TextEncoder, load: Callable[[], TextEncoder] | None = None):
        """`load` opens the encoder again after `release`; without it nothing is ever released."""
        self._encoder: TextEncoder | None = encoder
        self.tokenizer = encoder.tokenizer  # small, and never put away
        self._load = load
        self._known: collections.OrderedDict[tuple[str, TextForm], np.ndarray] = collections.OrderedDict()
        self._bytes = 0
        self.encoded = 0  # prompts that had to be encoded

    def release(self) -> None:
        """Frees the encoder's memory until a new prompt comes."""
        if self._load is not None:
            self._encoder = None

    def _embed(self, prompt: str, form: TextForm) -> Float[np.ndarray, "tokens width"]:
        key = form.normalise(prompt), form
        if key not in self._known:
            if self._encoder is None:
                assert self._load is not None
                self._encoder = self._load()
            # Not rounded as records are: two values a rounding error apart could end a whole bfloat16 apart.
            text = self._encoder.encode_form([prompt], form)
            embedding = text.embeddings[0][text.mask[0]]
            self.encoded += 1
            self._known[key] = embedding
            self._bytes += embedding.nbytes
            while self._bytes > MEMORY_BYTES and len(self._known) > 1:
                self._bytes -= self._known.popitem(last=False)[1].nbytes
        self._known.move_to_end(key)
        return self._known[key]

    def __call__(self, prompts: Sequence[str], form: TextForm, width: int) -> Text:
        """Prompts in a stage's form, (prompts, length, width); any texts, of embeddings of that width."""
        return form.pad([self._embed(prompt, form) for prompt in prompts], width)
