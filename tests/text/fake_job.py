"""What jobs with a made-up encoder need."""

import io
import tarfile
import zlib

import numpy as np
from PIL import Image

from imagen_jax.data import records
from imagen_jax.data.encoder_identity import EncoderIdentity, sketch
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.text.precompute import PrecomputeConfig
from imagen_jax.text.store import TokenCounts

WIDTH = 5


def expected_embedding(caption, max_length=128):
    tokens = min(len(caption.split()) + 1, max_length)
    rng = np.random.default_rng(zlib.crc32(caption.encode()))
    return rng.normal(size=(tokens, WIDTH)).astype(np.float32)


class FakeEncoder:
    """An embedding is a function of the caption; counts the captions it was asked for."""

    name = "fake"
    width = WIDTH

    def __init__(self, identity="fake"):
        self.asked = []
        self._sketch = sketch(expected_embedding(identity)[0])

    @property
    def identity(self):
        return EncoderIdentity(width=WIDTH, tokenizer="words", sketches=(self._sketch,))

    def encode(self, captions, *, max_length):
        self.asked += captions
        return [expected_embedding(caption, max_length) for caption in captions]

    def count_tokens(self, captions, *, max_length):
        """Of each caption, the words that are not ASCII are unknown; a batch computes 10 tokens a caption."""
        tokens = [len(expected_embedding(caption, max_length)) for caption in captions]
        unknown = [sum(not word.isascii() for word in caption.split()) for caption in captions]
        return TokenCounts(unknown=tuple(unknown), useful=sum(tokens), computed=10 * len(captions))


def png(number, side=8):
    encoded = io.BytesIO()
    array = np.random.default_rng(number).integers(0, 255, (side, side, 3)).astype(np.uint8)
    Image.fromarray(array).save(encoded, "PNG")
    return encoded.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


GOOD = [i for i in range(20) if i not in (3, 11, 7)]


def config(tmp_path, spec, **changes):
    values = {"source": spec, "text_encoder": "fake", "out": str(tmp_path / "out")}
    return PrecomputeConfig(**(values | changes))


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def parsed(folder, split="train"):
    info = records.read_folder_info(folder)
    return [
        [records.parse(reader[i], info.encoder.width, "here") for i in range(len(reader))]
        for reader in map(TFRecordReader, info.shards(split))
    ]


class DiesAfter(FakeEncoder):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def encode(self, captions, *, max_length):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().encode(captions, max_length=max_length)
