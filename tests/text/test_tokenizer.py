"""Tokenizers that fit their encoder or are refused, and what of a text they lose."""

import json

import pytest
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.text.small import make_small_encoder
from imagen_jax.text.tokenizer import CaptionTokenizer

WORDS = "a red circle left of a large green star on blue background"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4242\n"


@pytest.fixture
def folder(tmp_path):
    return make_small_encoder(tmp_path / "encoder", vocabulary_texts=[WORDS], width=8, layers=1)


def load(folder, rows=None):
    table = json.loads((folder / "config.json").read_text())["vocab_size"]
    return CaptionTokenizer.load(epath.Path(folder), epath.Path(folder), rows=rows or table)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_ids_beyond_the_table_are_refused(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    load(folder, rows=rows + 100)  # T5's own tables are longer than their vocabularies
    assert f"but the encoder's table has {rows - 1} rows" in refusal(folder, rows=rows - 1)
    whole = json.loads((folder / "tokenizer.json").read_text())
    for place in ("vocabulary", "added"):
        tokenizer = json.loads(json.dumps(whole))
        if place == "vocabulary":
            tokenizer["model"]["vocab"]["circle"] = rows + 5
        else:
            new = {"id": rows, "content": "zebra", "special": False, "normalized": False}
            tokenizer["added_tokens"].append(new | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        number, word = (rows + 5, "circle") if place == "vocabulary" else (rows, "zebra")
        assert f"token id {number} ('{word}'), but the encoder's table has {rows} rows" in refusal(folder)


def test_a_token_that_the_vocabulary_does_not_tell_is_refused_when_it_comes():
    class Telling:
        eos_token_id, unk_token_id = 1, None

        def get_vocab(self):
            return {"</s>": 1}

        def __call__(self, captions, **_):
            return {"input_ids": [[len(caption)] for caption in captions]}

    tokenizer = CaptionTokenizer(Telling(), rows=5, where="somewhere")
    assert tokenizer.tokenize(["four"], 9) == [[4, 1]]
    with pytest.raises(UserError, match="somewhere: token id 5, but the encoder's table has 5 rows"):
        tokenizer.tokenize(["four", "fives"], 9)
    Telling.eos_token_id = 5
    with pytest.raises(UserError, match="token id 5, but"):
        CaptionTokenizer(Telling(), rows=5, where="somewhere")


def test_unknown_words_are_named_once(folder):
    tokenizer = load(folder)
    assert tokenizer.unknown_words("A Red circle, on a star.") == []
    assert tokenizer.unknown_words("a zebra, a red (quagga) and a zebra") == ["zebra", "quagga", "and"]
    assert tokenizer.unknown_words("一个红色的圆 red") == ["一个红色的圆"]
    assert tokenizer.unknown_words("a \N{LARGE RED CIRCLE}!") == ["\N{LARGE RED CIRCLE}"]
    assert tokenizer.unknown_words("!") == tokenizer.unknown_words("") == []


def test_what_is_left_out_begins_with_a_word(folder):
    tokenizer = load(folder)
    assert tokenizer.left_out(WORDS, 13) == ""
    assert tokenizer.left_out(WORDS, 12) == "background"
    assert tokenizer.left_out(f"  {WORDS} ", 4) == "left of a large green star on blue background"
    assert tokenizer.left_out(WORDS, 1) == WORDS
    assert tokenizer.is_longer([WORDS, "a red circle", ""], 4) == [True, False, False]
    # Each is a token of its own, and there are no spaces.
    assert tokenizer.left_out("红" * 40 + "圆形", 41) == "圆形"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "[]"}, "the tokenizer does not open"),
        ({"tokenizer.json": "{}"}, "the tokenizer does not open"),
        ({"tokenizer.json": '{"a": '}, "is not valid JSON"),
        ({"tokenizer.json": b"\xff\xfe"}, "is not UTF-8"),
        ({"tokenizer.json": POINTER}, "a Git LFS pointer"),
        ({"tokenizer_config.json": POINTER}, "a Git LFS pointer"),
        ({"tokenizer_config.json": "[]"}, "must be a JSON object"),
        ({"tokenizer_config.json": '{"tokenizer_class": 3}'}, "'tokenizer_class' must be a text, got 3"),
        ({"tokenizer_config.json": '{"tokenizer_class": "AutoTokenizer"}'}, "'AutoTokenizer' is not one of"),
        ({"tokenizer.json": None}, "no tokenizer.json or spiece.model"),
        ({"tokenizer.json": None, "spiece.model": b"garbage"}, "spiece.model is not a SentencePiece model"),
        ({"tokenizer.json": None, "spiece.model": b""}, "spiece.model is not a SentencePiece model"),
        ({"tokenizer.json": None, "spiece.model": POINTER}, "a Git LFS pointer"),
    ],
)
def test_bad_files_give_one_line(files, message, folder):
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(folder)


def test_a_tokenizer_that_fails_on_a_text_gives_one_line(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "<none>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the tokenizer fails"):
        load(folder).tokenize(["zebra"], 9)


@pytest.fixture
def spelling(tmp_path):
    return make_small_encoder(
        tmp_path / "spelling", vocabulary_texts=[WORDS, "一个红色的圆"], width=8, layers=1, byte_fallback=True
    )


def test_words_that_are_lacking_are_spelled(spelling):
    """By SentencePiece's names of bytes, which its own models have at their beginning too."""
    tokenizer = load(spelling)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [names[i] for i in tokenizer.tokenize(["A Red zé, 红 starfish"], 32)[0]]
    assert tokens == [
        *("▁a", "▁red", "▁", "<0x7A>", "<0xC3>", "<0xA9>", "▁", "<0x2C>", "▁红"),
        *("▁star", "<0x66>", "<0x69>", "<0x73>", "<0x68>", "</s>"),
    ]
    assert [names[i] for i in range(4)] == ["<pad>", "</s>", "<unk>", "<0x00>"]
    texts = ["zwk", "zwj", "红 red", "\N{LARGE RED CIRCLE}", "\x07", "", "starstar", "RED  red"]
    rows = tokenizer.tokenize(texts, 64)
    assert len({tuple(row) for row in rows}) >= len(texts) - 1  # a control character is nothing
    assert not any(names[number] == "<unk>" for row in rows for number in row)


def test_words_that_are_spelled_are_named_as_unknown(spelling):
    tokenizer = load(spelling)
    assert tokenizer.unknown_words("a zebra, a red (quagga) and a red zebra") == ["zebra", "quagga", "and"]
    assert tokenizer.unknown_words("A Red circle, 一个红色的圆!") == []
    assert tokenizer.left_out("a red zebra", 5) == "zebra"


def test_spelling_is_the_same_in_transformers(spelling):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(spelling)
    texts = ["A red zé, 红 starfish", "a zwk star", ""]
    assert theirs(texts)["input_ids"] == load(spelling).tokenize(texts, 64)


def test_a_small_encoder_that_spells_is_reproducible(spelling, tmp_path):
    again = make_small_encoder(
        tmp_path / "again", vocabulary_texts=["一个红色的圆", WORDS], width=8, layers=1, byte_fallback=True
    )
    for file in again.iterdir():
        assert file.read_bytes() == (spelling / file.name).read_bytes()
