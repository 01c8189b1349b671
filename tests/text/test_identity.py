"""An encoder's identity: the same for its copies in other precisions, files and places, another for any other."""

import json
import shutil

import numpy as np
import pytest

from imagen_jax.config import to_dict
from imagen_jax.data.encoder_identity import EncoderIdentity, identity_from_json, sketch
from imagen_jax.errors import UserError
from imagen_jax.models.weights import WeightReader, save_state
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.identity import identify
from imagen_jax.text.small import make_small_encoder

WORDS = ["a small red circle left of a large blue square", "two dogs and cats asleep on a wooden bench", "白"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_encoder(tmp_path_factory.mktemp("small"), vocabulary_texts=WORDS, width=64)


@pytest.fixture(scope="module")
def identity(folder):
    return TextEncoder.load(folder).identity


def changed(folder, target, change):
    """A copy whose matrices are changed."""
    shutil.copytree(folder, target)
    with WeightReader(folder) as reader:
        tensors = {name: np.array(reader.read(name)) for name in reader.names}
    tensors = {name: change(each) if each.ndim == 2 else each for name, each in tensors.items()}
    (target / "model.safetensors").unlink()
    save_state(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def as_int8(matrix):
    scale = np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-9) / 127
    return (np.rint(matrix / scale) * scale).astype(np.float32)


def fine_tuned(matrix):
    moves = np.random.default_rng(3).standard_normal(matrix.shape)
    return (matrix + 0.1 * matrix.std() * moves).astype(np.float32)


def test_copies_are_the_same_encoder(folder, identity, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert TextEncoder.load(tmp_path / "elsewhere").identity == identity
    assert not TextEncoder.load(folder, dtype="bfloat16").identity.differences(identity)
    quantised = changed(folder, tmp_path / "int8", as_int8)
    assert not TextEncoder.load(quantised).identity.differences(identity)
    assert not TextEncoder.load(quantised, dtype="bfloat16").identity.differences(identity)


@pytest.mark.parametrize(
    ("make", "difference"),
    [
        (lambda f, t: make_small_encoder(t, vocabulary_texts=WORDS, width=64, seed=1), "embeddings differ"),
        (lambda f, t: changed(f, t, fine_tuned), "embeddings differ, cosine 0.9"),
        (lambda f, t: make_small_encoder(t, vocabulary_texts=WORDS, width=32), "width 64 and 32"),
        # As many words, of which the texts of the identity hold neither.
        (
            lambda f, t: make_small_encoder(t, vocabulary_texts=[*WORDS[:2], "黑"], width=64),
            "their tokenizers differ",
        ),
    ],
    ids=["seed", "fine-tuned", "width", "vocabulary"],
)
def test_others_are_not(folder, identity, tmp_path, make, difference):
    other = TextEncoder.load(make(folder, tmp_path / "other")).identity
    assert difference in identity.differences(other)
    assert other.differences(identity)


class Tokenized:
    """A tokenizer beside embeddings that do not matter."""

    name, width = "tokenized", 4

    def __init__(self, vocabulary, ids):
        self.vocabulary, self._ids = vocabulary, ids

    def tokenize(self, captions, max_length):
        return [row[:max_length] for row in self._ids(list(captions))]

    def encode(self, captions, *, max_length, dtype):
        return [np.ones((2, 4), np.float32) for _ in captions]


def test_files_of_one_tokenizer_agree(tmp_path):
    """A SentencePiece model by SentencePiece and by transformers, and the tokenizer.json that that makes of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import T5Tokenizer

    hashes = []
    for lines in (WORDS, [line[::-1] for line in WORDS]):
        place = tmp_path / lines[0][:5]
        place.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{line} {number}" for number in range(200) for line in lines),
            model_prefix=str(place / "spiece"),
            vocab_size=60,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        (place / "spiece.vocab").unlink()
        reference = sentencepiece.SentencePieceProcessor(model_file=str(place / "spiece.model"))
        pieces = {reference.id_to_piece(i): i for i in range(reference.get_piece_size())}
        readers = [Tokenized(pieces, lambda texts, by=reference: [[*ids, 1] for ids in by.encode(texts)])]
        for _ in range(2):
            opened = T5Tokenizer.from_pretrained(place, local_files_only=True)
            readers.append(
                Tokenized(opened.get_vocab(), lambda texts, by=opened: by(list(texts))["input_ids"])
            )
            (place / "spiece.model").unlink(missing_ok=True)
            opened.save_pretrained(place)
        hashes.append({identify(reader).tokenizer for reader in readers})
    first, second = hashes
    assert len(first) == len(second) == 1 and first != second


def test_a_few_large_channels_do_not_decide():
    """Two unrelated embeddings that share T5's outlier channels; their plain cosine is near 1."""
    one, other = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    one[[0, 511]] = other[[0, 511]] = 300.0  # channels that a sketch keeps
    assert one @ other > 0.99 * np.linalg.norm(one) * np.linalg.norm(other)
    first, second = (
        EncoderIdentity(width=512, tokenizer="", sketches=(sketch(each),)) for each in (one, other)
    )
    assert "embeddings differ" in first.differences(second)
    louder = EncoderIdentity(width=512, tokenizer="", sketches=(sketch(2 * one),))
    assert not first.differences(louder)


def test_json_holds_all_of_it(identity):
    text = json.dumps(to_dict(identity))
    assert len(text) < 2000
    assert identity_from_json(json.loads(text), "here") == identity
    assert identity_from_json(None, "here") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"width": "64"},
        {"width": 63},
        {"tokenizer": None},
        {"sketches": "AAAA"},
        {"sketches": ["AAAA"]},
        {"sketches": ["é"]},
        {"colour": "red"},
    ],
)
def test_other_json_is_refused(identity, changes):
    with pytest.raises(UserError, match=r"^X/metadata\.json"):
        identity_from_json(to_dict(identity) | changes, "X/metadata.json: identity")


def test_embeddings_that_are_not_finite_have_no_identity(folder, tmp_path):
    broken = TextEncoder.load(changed(folder, tmp_path / "nan", lambda matrix: matrix * np.float32(np.nan)))
    with pytest.raises(UserError, match=r"text encoder nan: .* not finite"):
        _ = broken.identity
