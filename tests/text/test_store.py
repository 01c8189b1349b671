import io

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from imagen_jax.data import records
from imagen_jax.text.store import BLOCK_SIZE, EmbeddingDtype, dequantise, pack, quantise


def embeddings(tokens, width, outliers=4):
    """Unit normals with channels that are 60 standard deviations out, as those of T5 encoders are."""
    rng = np.random.default_rng(width)
    values = rng.normal(size=(tokens, width)).astype(np.float32)
    channels = rng.permutation(width)[:outliers]
    values[:, channels] = (
        60 * rng.choice([-1, 1], (tokens, outliers)) * rng.uniform(0.9, 1, (tokens, outliers))
    )
    return values, channels


def cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.mark.parametrize(("width", "block"), [(4096, 64), (96, 64), (5, 64), (128, 32), (64, 64), (65, 1)])
def test_against_a_plain_loop(width, block):
    embedding, _ = embeddings(3, width)
    embedding[1, :block] = 0  # a block of zeros
    values, scale = quantise(embedding, block_size=block)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    back = dequantise(values, scale, block_size=block)
    for token in range(3):
        for number, start in enumerate(range(0, width, block)):
            part = embedding[token, start : start + block].astype(np.float64)
            wanted = max(abs(value) for value in part) / 127
            np.testing.assert_allclose(scale[token, number], wanted, rtol=1e-6)
            for i, value in enumerate(part):
                integer = int(values[token, start + i])
                assert abs(integer) <= 127
                assert abs(integer * wanted - value) <= 0.5001 * wanted
                np.testing.assert_allclose(back[token, start + i], integer * wanted, rtol=1e-6)
    assert scale.shape == (3, number + 1)


def test_extreme_values():
    tiny = np.array([[1e-45, 0.0, -1e-40, 3e38, -3e38, 1.0]], np.float32)
    values, scale = quantise(tiny, block_size=3)
    assert np.abs(dequantise(values, scale, block_size=3) - tiny).max() < 3e38 / 127
    assert np.abs(values).max() == 127
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            quantise(np.full((1, 2), bad, np.float32))
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        quantise(tiny, block_size=0)
    with pytest.raises(ValueError, match="2 scales per token for 6 channels in blocks of 64"):
        dequantise(values, scale)


@pytest.mark.parametrize("width", [512, 1024, 4096])
def test_outlier_channels_cost_little(width):
    embedding, channels = embeddings(200, width)
    values, scale = quantise(embedding)
    back = dequantise(values, scale)
    assert cosines(embedding, back).min() > 0.999
    # Nor does one scale for a whole token, which would lose the others, go unnoticed here.
    whole = dequantise(*quantise(embedding, block_size=width), block_size=width)
    others = np.setdiff1d(np.arange(width), channels)
    assert cosines(embedding[:, others], whole[:, others]).min() < 0.995
    if width == 4096:
        assert cosines(embedding[:, others], back[:, others]).min() > 0.999


def test_bytes_of_a_record():
    embedding, _ = embeddings(15, 4096)
    stored = pack(embedding, EmbeddingDtype.INT8)
    content = 15 * (4096 + 4096 // BLOCK_SIZE * 4)
    assert stored.nbytes == content
    record = records.Record(
        key="0001",
        image=None,
        caption="a caption of fifteen tokens",
        text_embedding=stored.values,
        text_embedding_scale=stored.scale,
    )
    size = len(records.serialize(record))
    assert content < size <= 1.02 * content
    assert 24 * size < 128 * 4096 * 4
    assert pack(embedding, EmbeddingDtype.BFLOAT16).nbytes == 15 * 4096 * 2


def test_tfds_serialises_the_same_and_reads_it():
    embedding, _ = embeddings(3, 96)
    stored = pack(embedding, EmbeddingDtype.INT8)
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4)).save(encoded, "PNG")
    record = records.Record(
        key="k",
        image=encoded.getvalue(),
        caption="c",
        text_embedding=stored.values,
        text_embedding_scale=stored.scale,
    )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
            "text_embedding": tfds.features.Tensor(shape=(None, 96), dtype=np.int8, encoding="bytes"),
            "text_embedding_scale": tfds.features.Tensor(shape=(None, 2), dtype=np.float32, encoding="bytes"),
        }
    )
    assert records.features_json(96, block_size=64) == features.to_json()
    example = {
        "image": record.image,
        "caption": "c",
        "key": "k",
        "text_embedding": stored.values.tobytes(),
        "text_embedding_scale": stored.scale.tobytes(),
    }
    data = ExampleSerializer(features.get_serialized_info()).serialize_example(example)
    back = records.parse(data, 96, "here")
    np.testing.assert_array_equal(back.text_embedding, stored.values)
    np.testing.assert_array_equal(back.text_embedding_scale, stored.scale)
    wanted = dequantise(stored.values, stored.scale).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back.embedding(64), wanted)
    read = features.deserialize_example_np(records.serialize(record))
    np.testing.assert_array_equal(read["text_embedding"], stored.values)
    np.testing.assert_array_equal(read["text_embedding_scale"], stored.scale)
