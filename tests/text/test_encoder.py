import fnmatch
import importlib
import itertools
import json
import os
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from imagen_jax.data.pipeline import _pad_texts
from imagen_jax.errors import UserError
from imagen_jax.text import encoder as encoder_module
from imagen_jax.text import tokenizer as tokenizer_module
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.small import make_small_encoder
from imagen_jax.text.tokenizer import CaptionTokenizer

COLORS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
PLACES = ["above", "below", "beside", "inside"]
CAPTIONS = [
    f"a {c} {s} {p} a {d} {t}" for c, s, p, d, t in itertools.product(COLORS, SHAPES, PLACES, COLORS, SHAPES)
][::11]
CHINESE = "一个红色的圆"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_encoder(tmp_path_factory.mktemp("small"), vocabulary_texts=[*CAPTIONS, CHINESE])


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.load(folder)


def test_tokens_end_with_eos_and_are_cut(encoder):
    full, cut, empty, chinese = encoder.tokenize(["A Red  circle", "a red circle", "", CHINESE], 7)
    assert full[:-1] == encoder.tokenize(["a red circle"], 77)[0][:-1]
    assert len(full) == 4 and full[-1] == 1
    assert encoder.tokenize(["a red circle"], 3) == [[*full[:2], 1]]
    assert empty == [1]
    assert len(chinese) == 7 and len(set(chinese)) == 7 and 2 not in chinese  # each character is known
    assert encoder.tokenize(["zebra"], 7) == [[2, 1]]
    assert encoder.tokenize([], 7) == [] and cut == full
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encoder.tokenize(["a"], 0)


def test_embeddings_come_ragged_and_in_order(encoder):
    captions = ["a red circle", "", CAPTIONS[0], "a red circle", "a blue star"]
    result = encoder.encode(captions)
    assert [r.shape for r in result] == [(4, 96), (1, 96), (8, 96), (4, 96), (4, 96)]
    assert all(r.dtype == np.float32 for r in result)
    assert result[0] is result[3]  # encoded once
    for caption, got in zip(captions, result, strict=True):
        np.testing.assert_allclose(got, encoder.encode([caption])[0], atol=1e-5)
    assert encoder.encode([]) == []


def test_result_does_not_depend_on_the_company(encoder):
    alone = encoder.encode([CAPTIONS[5]], dtype="bfloat16")[0].astype(np.float32)
    for company in (CAPTIONS[:6], CAPTIONS[:600], CAPTIONS[600:3:-1]):
        crowd = encoder.encode(company, dtype="bfloat16")[company.index(CAPTIONS[5])].astype(np.float32)
        # At most one rounding of bfloat16 apart.
        np.testing.assert_allclose(crowd, alone, rtol=2**-7, atol=1e-5)


def test_long_texts_are_cut_and_bucketed(encoder):
    text = " ".join(CAPTIONS[:40])
    (short,) = encoder.encode([text])
    assert short.shape == (128, 96)
    (long,) = encoder.encode([text], max_length=270)
    assert long.shape == (270, 96)
    for length, bucket in [(1, 4), (8, 8), (9, 10), (77, 80), (256, 256), (257, 512), (700, 768)]:
        assert encoder_module._padded_length(length) == bucket


def test_what_is_stored_and_cut_is_what_is_drawn(encoder):
    """At whatever lengths a text is cut on its way, each token's embedding is that of the whole text."""
    text = " ".join(CAPTIONS[:20])  # 141 tokens with </s>
    (whole,) = encoder.encode([text], max_length=512)
    (stored,) = encoder.encode([text], max_length=128)
    for length in (1, 2, 10, 127, 128):
        (drawn,) = encoder.encode([text], max_length=length)
        np.testing.assert_array_equal(drawn, np.concatenate([whole[: length - 1], whole[-1:]]))
        padded, mask = _pad_texts([stored.astype(ml_dtypes.bfloat16)], length)
        np.testing.assert_array_equal(padded[0], drawn.astype(ml_dtypes.bfloat16))
        assert mask.all()
    # Beyond what the encoder sees, words have no say; before it all have.
    (much,) = encoder.encode([f"{text} " * 4], max_length=8)
    (more,) = encoder.encode([f"{text} " * 5], max_length=8)
    np.testing.assert_array_equal(much, more)
    assert np.abs(much[-1] - encoder.encode([f"{text} " * 2], max_length=8)[0][-1]).max() > 1e-3
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encoder.encode(["a"], max_length=0)


def test_few_shapes_are_compiled(folder):
    encoder = TextEncoder.load(folder)
    for n in (1, 2, 5, 600, 700, 1300):
        encoder.encode(CAPTIONS[:n])
    assert encoder._encode._cache_size() <= 4  # 1, 8, 32 and 128 rows of one length


def caption_lengths(count, seed=0):
    """Lengths of captions as people write them: most near 11 tokens, a few of up to 80."""
    lengths = np.random.default_rng(seed).lognormal(2.2, 0.55, count)
    return np.clip(lengths.astype(int) + 1, 2, 80).tolist()


def test_plan_covers_all_texts_and_fits_them():
    for lengths in (caption_lengths(1), caption_lengths(7), caption_lengths(1024), [600, 5, 300], []):
        rest = sorted(lengths, reverse=True)
        for count, rows, length in encoder_module._plan(lengths):
            batch, rest = rest[:count], rest[count:]
            assert 0 < len(batch) == count <= rows
            assert max(batch) <= length
            assert rows * length <= encoder_module._TOKENS_PER_BATCH or rows <= 8
        assert not rest


def test_plan_is_the_cheapest(monkeypatch):
    """Against all ways to cut a few texts into batches."""
    monkeypatch.setattr(encoder_module, "_ROWS", (1, 2, 4))
    monkeypatch.setattr(encoder_module, "_BATCH_COST", 5)

    def cheapest(rest):
        if not rest:
            return 0
        length = encoder_module._padded_length(rest[0])
        return min(rows * length + 5 + cheapest(rest[rows:]) for rows in (1, 2, 4))

    for seed in range(30):
        lengths = caption_lengths(9, seed)
        found = sum(rows * length + 5 for _, rows, length in encoder_module._plan(lengths))
        assert found == cheapest(sorted(lengths, reverse=True))


def test_little_is_padding():
    windows = [caption_lengths(1024, seed) for seed in range(4)]
    plans = [encoder_module._plan(lengths) for lengths in windows]
    computed = sum(rows * length for plan in plans for _, rows, length in plan)
    assert sum(map(sum, windows)) >= 0.85 * computed
    assert len({(rows, length) for plan in plans for _, rows, length in plan}) <= 40
    assert all(len(plan) < 40 for plan in plans)


def test_token_counts(encoder):
    counts = encoder.count_tokens(["a red zebra", "", "a red zebra", "zebra quagga"], max_length=128)
    assert counts.unknown == (1, 0, 1, 2)
    assert counts.useful == 4 + 1 + 3
    assert counts.computed == 8 * 4  # one batch of 8 rows: three of 1 row would cost more to start
    assert encoder.count_tokens(["zebra quagga"], max_length=2).unknown == (1,)
    assert encoder.count_tokens([], max_length=2).computed == 0
    # Whole texts are computed, whatever is kept of them.
    counts = encoder.count_tokens(["a red circle", "a red zebra star", "word " * 600], max_length=4)
    assert counts.cut == (False, True, True) and counts.unknown == (0, 1, 3)
    assert counts.useful == 4 + 5 + 512 and counts.computed == 8 * 6 + 512
    assert encoder.count_tokens(["a " * 511, "a " * 512], max_length=512).cut == (False, True)


def test_bfloat16_encoder_is_close(folder, encoder):
    low = TextEncoder.load(folder, dtype="bfloat16").encode(CAPTIONS[:3])
    for got, exact in zip(low, encoder.encode(CAPTIONS[:3]), strict=True):
        assert got.dtype == ml_dtypes.bfloat16
        assert np.linalg.norm(got.astype(np.float32) - exact) < 0.03 * np.linalg.norm(exact)


def test_mesh_gives_the_same_embeddings(folder, encoder):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    got = TextEncoder.load(folder, mesh=mesh).encode(CAPTIONS[:9])
    for a, b in zip(got, encoder.encode(CAPTIONS[:9]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("copied", [True, False])
def test_devices_of_a_mesh_give_the_same_embeddings(folder, encoder, copied):
    """They share each batch; the last batch is not full."""
    mesh = jax.make_mesh((4,), ("devices",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    several = TextEncoder.load(folder, mesh=mesh, copied=copied)
    captions = CAPTIONS[:700]
    for a, b in zip(several.encode(captions), encoder.encode(captions), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    parts = {shard.data.size for shard in several._params["layers.query"].addressable_shards}
    # No device computes more than a third of what one alone does.
    one, four = (found.count_tokens(captions).computed for found in (encoder, several))
    assert four / 4 < one / 3
    assert parts == {several._params["layers.query"].size // (1 if copied else 4)}


def test_parameters_are_copied_where_a_third_of_the_memory_stays_free():
    size = 2**20
    abstract = {
        "a": jax.ShapeDtypeStruct((size // 8,), np.float32),
        "b": jax.ShapeDtypeStruct((size // 4,), ml_dtypes.bfloat16),
    }

    def mesh_with(**stats):
        devices = np.array(
            [mock.Mock(**{"memory_stats.return_value": each}) for each in ({"bytes_limit": 2**40}, stats)]
        )
        return mock.Mock(spec=jax.sharding.Mesh, devices=devices)

    assert encoder_module._fits(mesh_with(bytes_limit=size * 1.6), abstract)
    assert not encoder_module._fits(mesh_with(bytes_limit=size * 1.5), abstract)
    assert not encoder_module._fits(mesh_with(bytes_limit=size * 1.6, bytes_in_use=size * 0.2), abstract)
    assert not encoder_module._fits(mesh_with(), abstract)  # CPUs do not say


def test_saved_copy_is_complete(encoder, tmp_path):
    encoder.save_copy(tmp_path / "copy")
    copy = TextEncoder.load(tmp_path / "copy")
    assert copy.width == 96 and copy.name == "copy"
    np.testing.assert_array_equal(copy.encode(CAPTIONS[:1])[0], encoder.encode(CAPTIONS[:1])[0])
    # A copy over files that are in use, and mapped, leaves those alone.
    weights = tmp_path / "copy" / "model.safetensors"
    with weights.open("rb") as in_use:
        encoder.save_copy(tmp_path / "copy")
        assert os.fstat(in_use.fileno()).st_ino != weights.stat().st_ino
    assert not [path.name for path in (tmp_path / "copy").iterdir() if "partial" in path.name]


def test_pipeline_folder_with_the_tokenizer_beside(folder, encoder, tmp_path):
    for part, names in {
        "text_encoder": ["config.json", "model.safetensors"],
        "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
    }.items():
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).write_bytes((folder / name).read_bytes())
    for place in (tmp_path, tmp_path / "text_encoder"):
        loaded = TextEncoder.load(place)
        np.testing.assert_array_equal(loaded.encode([CHINESE])[0], encoder.encode([CHINESE])[0])
    loaded.save_copy(tmp_path / "flat")
    assert TextEncoder.load(tmp_path / "flat").tokenize([CHINESE], 9) == encoder.tokenize([CHINESE], 9)


def test_what_cannot_be_loaded_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        UserError, match="text encoder google/t5: no such folder, and not to be had from the hub"
    ):
        TextEncoder.load("google/t5")
    with pytest.raises(UserError, match="/no/such/place: no such folder"):
        TextEncoder.load("/no/such/place")
    with pytest.raises(UserError, match="dtype 'float16'"):
        TextEncoder.load(folder, dtype="float16")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="'clip' is not a T5 encoder"):
        TextEncoder.load(tmp_path)
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018 - loaded before a library is hidden from it
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda _: None)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(UserError, match="pip install sentencepiece"):
        CaptionTokenizer.load(epath.Path(tmp_path), epath.Path(tmp_path), rows=9)


def test_a_hub_id_with_a_revision(folder, tmp_path, monkeypatch):
    """Only what is needed is fetched: pickled weights where there are no others."""
    asked = []

    def hub(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        for file in folder.iterdir():
            pickled = file.name.replace("model.safetensors", "pytorch_model.bin")
            name = pickled if repository == "google/pickled" else file.name
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_bytes(file.read_bytes())
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert TextEncoder.load("google/t5@refs/pr/1").width
    assert asked == [("google/t5", "refs/pr/1")]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not weights that PyTorch has pickled"):
        TextEncoder.load("google/pickled")
    assert asked[1:] == [("google/pickled", None)] * 2


def offline(*_, **__):
    raise ConnectionError("no route to host")


def test_small_encoder_is_reproducible(folder, tmp_path):
    again = make_small_encoder(tmp_path / "again", vocabulary_texts=[CHINESE, *reversed(CAPTIONS)])
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    other = make_small_encoder(tmp_path / "other", vocabulary_texts=[*CAPTIONS, CHINESE], seed=1)
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="got 0 and 2"):
        make_small_encoder(tmp_path, vocabulary_texts=[], width=0)


def test_small_encoder_embeddings_tell_word_and_previous_word(encoder):
    """A linear map reads both from held-out captions: the words are there, and adjectives are bound."""
    embeddings = encoder.encode(CAPTIONS)
    ids = encoder.tokenize(CAPTIONS, 128)
    halves = slice(0, None, 2), slice(1, None, 2)  # learned from, and held out
    for shift in (0, 1):
        x = [np.concatenate([e[shift:] for e in embeddings[part]]) for part in halves]
        y = [np.concatenate([np.array(row)[: len(row) - shift] for row in ids[part]]) for part in halves]
        inputs = [np.pad(part, ((0, 0), (0, 1)), constant_values=1) for part in x]
        weights = np.linalg.lstsq(inputs[0], np.eye(encoder.vocab_size)[y[0]], rcond=None)[0]
        accuracy = np.mean(np.argmax(inputs[1] @ weights, axis=1) == y[1])
        assert accuracy >= 0.99, (shift, accuracy)


def test_small_encoder_keeps_each_token_its_own(encoder):
    """The word itself dominates an embedding; its company is visible and weaker."""
    red, blue, square = encoder.encode(["a red circle", "a blue circle", "a red square"])

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert 0.6 < cosine(red[2], blue[2]) < 0.95  # the same word after another
    assert cosine(red[2], square[2]) < 0.6  # another word in the same place


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")])
def test_accelerators_compute_in_bfloat16_unless_told_otherwise(folder, monkeypatch, backend, dtype):
    """T5-XXL in float32 is larger than the memory of most."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert TextEncoder.load(folder).dtype == dtype
    assert TextEncoder.load(folder, dtype="float32").dtype == "float32"
