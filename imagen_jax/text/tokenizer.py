"""Tokenizers of text encoders, opened from strangers' folders without running anything of theirs."""

import bisect
import contextlib
import importlib.util
import os
import re
import string
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath
from tokenizers import Tokenizer

from imagen_jax.errors import UserError
from imagen_jax.files import exists, is_cloud, json_field, parse_json, read_bytes, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
)
# Classes of transformers that add nothing of their own to tokenizer.json.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Those that T5 encoders come with. No other is opened, and none by its module's name: some run code of the folder's.
_CLASSES = (
    *("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast", "ByT5Tokenizer"),
    *("LlamaTokenizer", "LlamaTokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast"),
    *("BertTokenizer", "BertTokenizerFast", *_PLAIN_CLASSES),
)
_RENAMED = {"MT5Tokenizer": "T5Tokenizer", "MT5TokenizerFast": "T5TokenizerFast"}
# A vocabulary file of 64 MB has a million tokens.
_VOCABULARY_BYTES = 256 * 2**20
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # SentencePiece's names of single bytes
_LONGEST_WORD = 24  # letters; longer ones are texts in a script without spaces


def cut_tokens(ids: list[int], length: int) -> list[int]:
    """The first tokens of a text, so many of them with its end token, which stays the last."""
    return [*ids[:-1][: length - 1], ids[-1]]


class CaptionTokenizer:
    """Captions to token ids that the encoder's table has.

    Attributes:
        unknown: ids that stand for what the vocabulary lacks: the unknown token's, and those of single bytes of a
            vocabulary that spells what it lacks. Empty: it lacks nothing.
        spells: whether what the vocabulary lacks is spelled, a token a byte.
    """

    unknown: frozenset[int]
    spells: bool

    def __init__(self, tokenizer: Any, *, rows: int, where: str):
        """Takes over a tokenizer of transformers, or a `PlainTokenizer`.

        Args:
            tokenizer: what to use.
            rows: of the encoder's embedding table.
            where: its folder, for messages.

        Raises:
            UserError: it has token ids that the table has no row for, or no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(f"{where}: the tokenizer has no end-of-sequence token; is it a T5 tokenizer?")
        self._tokenizer, self._rows, self._where = tokenizer, rows, where
        self._eos = int(tokenizer.eos_token_id)
        vocabulary = self.get_vocab()
        spelled = {vocabulary[piece] for piece in BYTE_PIECES if piece in vocabulary}
        unknown = set() if tokenizer.unk_token_id is None else {int(tokenizer.unk_token_id)}
        self.unknown, self.spells = frozenset(unknown | spelled), bool(spelled)
        word = max(vocabulary, key=vocabulary.__getitem__, default=None)
        if word is not None:
            self._check_id(vocabulary[word], f" ({word!r})")
        self._check_id(self._eos)

    @classmethod
    def load(cls, folder: epath.Path, model: epath.Path, *, rows: int) -> "CaptionTokenizer":
        """Opens the tokenizer of a folder.

        Args:
            folder: with the tokenizer's files.
            model: with config.json, which may name the tokenizer's class.
            rows: of the encoder's embedding table.

        Raises:
            UserError: it does not open, is of a class that is not known here or of the folder's own, or does not
                fit the table; in one line.
        """
        name = _known_class(folder, model)
        tokenizer = PlainTokenizer.load(folder) or _open_known(folder, name)
        return cls(tokenizer, rows=rows, where=os.fspath(folder))

    def tokenize(self, captions: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each caption, ending with </s>, at most `max_length` of them, without padding.

        Raises:
            ValueError: max_length is below 1.
            UserError: a token has no row in the encoder's table.
        """
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        # Cut here and not by the tokenizer: its truncation warns, and tokenizers without a post-processor
        # append no </s>.
        rows = [[*row[: max_length - 1], self._eos] for row in self._ids(captions)]
        for row in rows:
            self._check_id(max(row))
        return rows

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return self._tokenizer.get_vocab()

    def is_longer(self, captions: Sequence[str], max_length: int) -> list[bool]:
        """Of each caption, whether `tokenize` cuts it."""
        return [len(row) + 1 > max_length for row in self._ids(captions)]

    def unknown_words(self, text: str) -> list[str]:
        """The words, and signs beyond ASCII, of which the vocabulary lacks a part; in order, each once."""
        if self.unknown.isdisjoint(self._ids([text])[0]):
            return []
        pieces = dict.fromkeys(re.findall(r"\w+|[^\w\s]", text))
        words = [piece for piece in pieces if piece not in string.punctuation]
        return [
            word
            for word, ids in zip(words, self._ids(words), strict=True)
            if not self.unknown.isdisjoint(ids)
        ]

    def left_out(self, text: str, max_length: int) -> str:
        """The end of a text that `tokenize` cuts off, from the beginning of a word; "" where it fits."""

        def too_long(end: int) -> bool:
            return self.is_longer([text[:end]], max_length)[0]

        ends = [word.end() for word in re.finditer(r"\S+", text)]
        kept = bisect.bisect_left(ends, True, key=too_long)
        if kept == len(ends):
            return ""
        begin = ends[kept - 1] if kept else 0
        if ends[kept] - begin > _LONGEST_WORD:
            letters = range(begin, ends[kept])
            begin = letters[bisect.bisect_left(letters, True, key=too_long) - 1]
        return text[begin:].strip()

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        if not captions:
            return []
        try:
            found = self._tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # the library raises no other, and says no more
            raise UserError(f"{self._where}: the tokenizer fails ({_first_line(error)})") from error
        return [[int(i) for i in row] for row in found]

    def _check_id(self, number: int, what: str = "") -> None:
        # JAX would take another row without a word.
        if not 0 <= number < self._rows:
            raise UserError(
                f"{self._where}: token id {number}{what}, but the encoder's table has {self._rows} rows: "
                "the tokenizer is of another encoder"
            )


class PlainTokenizer:
    """A tokenizer.json with the calls of transformers' tokenizers that are made here.

    transformers takes seconds to import, most of the time that a small encoder takes to open.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int, unk_token_id: int | None):
        self._tokenizer = tokenizer
        self.eos_token_id, self.unk_token_id = eos_token_id, unk_token_id

    @classmethod
    def load(cls, folder: epath.Path) -> "PlainTokenizer | None":
        """The tokenizer of a folder; None where transformers has to open it.

        Raises:
            UserError: a file is not what its name says.
        """
        config_path, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
        if not exists(config_path) or not exists(path):
            return None
        config = read_json(config_path)
        end, unk = config.get("eos_token"), config.get("unk_token")
        # A token is a text, or an object with flags, which transformers knows.
        if not isinstance(end, str) or not isinstance(unk, str | None):
            return None
        if config.get("tokenizer_class") not in _PLAIN_CLASSES:
            return None
        # Tokens that only the other files know would be missing here.
        if config.get("added_tokens_decoder") or exists(folder / "added_tokens.json"):
            return None
        text = read_bytes(path, limit=_VOCABULARY_BYTES)
        parse_json(text, str(path))
        try:
            tokenizer = Tokenizer.from_buffer(text)
            tokenizer.no_padding()
            tokenizer.no_truncation()
        except Exception as error:  # the library raises no other
            raise _does_not_open(path, error) from error
        eos = tokenizer.token_to_id(end)
        unknown = tokenizer.token_to_id(unk) if unk is not None else None
        return None if eos is None else cls(tokenizer, eos, unknown)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return self._tokenizer.get_vocab()

    def __call__(
        self, captions: Sequence[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        """Token ids of each caption under "input_ids"."""
        del verbose  # there is nothing to warn of
        encoded = self._tokenizer.encode_batch(list(captions), add_special_tokens=add_special_tokens)
        return {"input_ids": [each.ids for each in encoded]}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _does_not_open(where: epath.Path, error: Exception) -> UserError:
    return UserError(f"{where}: the tokenizer does not open ({_first_line(error)})")


def _known_class(folder: epath.Path, model: epath.Path) -> str:
    """The name of a tokenizer's class.

    Raises:
        UserError: it is the folder's own, or none of those that T5 encoders come with.
    """
    name = None
    for path in (folder / "tokenizer_config.json", model / "config.json"):
        content = read_json(path) if exists(path) else {}
        if content.get("auto_map") is not None:
            raise UserError(f"{path}: auto_map names code of the folder's own, which is never run")
        if content.get("tokenizer_class") is not None:
            name = name or json_field(content, "tokenizer_class", str, str(path))
    name = name or "T5Tokenizer"
    if name not in _CLASSES:
        raise UserError(f"{folder}: tokenizer_class {name!r} is not one of {', '.join(_CLASSES)}")
    return _RENAMED.get(name, name)


def _check_sentencepiece(path: epath.Path, model: bytes) -> None:
    """Refuses what is no SentencePiece model: transformers would make up a vocabulary without a word in it."""
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{path.parent}: {path.name} needs the sentencepiece package; pip install sentencepiece"
        )
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() if model else 0
    except RuntimeError:  # whose message is a place in its source
        pieces = 0
    if not pieces:
        raise UserError(f"{path} is not a SentencePiece model")


def _open_known(folder: epath.Path, name: str) -> Any:
    """A tokenizer that needs a class of transformers, by the class's name."""
    files = [file for file in TOKENIZER_FILES if exists(folder / file)]
    contents = {file: read_bytes(folder / file, limit=_VOCABULARY_BYTES) for file in files}
    for file, content in contents.items():
        if file.endswith(".json"):
            parse_json(content, str(folder / file))
    vocabularies = [
        file for file in ("tokenizer.json", "spiece.model", "tokenizer.model") if file in contents
    ]
    if not vocabularies and name != "ByT5Tokenizer":  # whose tokens are bytes
        raise UserError(f"{folder}: no tokenizer.json or spiece.model; copy the tokenizer's files there")
    if vocabularies and vocabularies[0] != "tokenizer.json":
        _check_sentencepiece(folder / vocabularies[0], contents[vocabularies[0]])
    # transformers takes seconds to import (it imports PyTorch where it finds it), and says that models
    # need PyTorch where it does not: the tokenizer needs none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    with contextlib.ExitStack() as stack:
        local = os.fspath(folder)
        if is_cloud(folder):
            local = stack.enter_context(tempfile.TemporaryDirectory())
            for file, content in contents.items():
                (epath.Path(local) / file).write_bytes(content)
        try:
            tokenizer_class = getattr(transformers, name)
            return tokenizer_class.from_pretrained(local, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a stranger's files bring about in the libraries
            raise _does_not_open(folder, error) from error
