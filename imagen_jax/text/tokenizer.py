"""Tokenizers that are fully described by their tokenizer.json, opened without transformers."""

import json
from collections.abc import Sequence

from etils import epath
from tokenizers import Tokenizer

# Classes of transformers that add nothing of their own to tokenizer.json.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class PlainTokenizer:
    """A tokenizer.json with the calls of transformers' tokenizers that the text encoder makes.

    transformers takes seconds to import, most of the time that a small encoder takes to open.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int, unk_token_id: int | None):
        self._tokenizer = tokenizer
        self.eos_token_id, self.unk_token_id = eos_token_id, unk_token_id

    @classmethod
    def load(cls, folder: epath.Path) -> "PlainTokenizer | None":
        """The tokenizer of a folder; None where transformers has to open it (or to say what is wrong)."""
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            text = (folder / "tokenizer.json").read_text()
            json.loads(text)
        except (OSError, ValueError):
            return None
        names = [
            config.get(name) if isinstance(config, dict) else None for name in ("eos_token", "unk_token")
        ]
        if not isinstance(names[0], str) or config.get("tokenizer_class") not in _PLAIN_CLASSES:
            return None
        # Tokens that only the other files know would be missing here.
        if config.get("added_tokens_decoder") or (folder / "added_tokens.json").exists():
            return None
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        eos = tokenizer.token_to_id(names[0])
        unknown = tokenizer.token_to_id(names[1]) if isinstance(names[1], str) else None
        return None if eos is None else cls(tokenizer, eos, unknown)

    def get_vocab(self) -> dict[str, int]:
        """Pieces and their ids."""
        return self._tokenizer.get_vocab()

    def __call__(
        self, captions: Sequence[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        """Token ids of each caption under "input_ids"."""
        del verbose  # there is nothing to warn of
        encoded = self._tokenizer.encode_batch(list(captions), add_special_tokens=add_special_tokens)
        return {"input_ids": [each.ids for each in encoded]}
