"""Every picture has a key of its own, and nothing of a source is lost to another's name."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagen_jax.data.examples import Example, Skipped, clean_captions
from imagen_jax.data.pictures import decode_picture
from imagen_jax.data.sources import open_source


def read_all(spec):
    source = open_source(spec)
    return [item for unit in source.units() for item in source.read(unit)]


def png():
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(encoded, "PNG")
    return encoded.getvalue()


def write_listing(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def keys_of(items):
    """The keys that records get, one a caption; those of further captions as the job makes them."""
    keys = []
    for item in items:
        if isinstance(item, Example):
            keys += [item.key, *(f"{item.key}#{number}" for number in range(1, len(item.captions)))]
    return keys


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "a.jpg"],
        ["a.png", "a.jpg", "a.png.webp"],
        ["a.png", "a.jpg", "a.png.webp", "a.png.webp.gif", "b.png"],
        ["a.png", "a#1.png", "a#1.jpg"],
        ["a.png", "a#1.png", "a#1#1.png", "b#1.png"],
    ],
)
def test_keys_of_a_listing(names, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(png())
    write_listing(tmp_path, [{"file_name": name, "caption": ["x", "y"]} for name in names])
    keys = keys_of(read_all(f"folder:{tmp_path}"))
    assert len(keys) == len(set(keys)) == 2 * len(names)


def test_a_picture_of_two_listings_comes_once(tmp_path):
    for folder, name in (("x", "../y/p.png"), ("y", "p.png")):
        write_listing(tmp_path / folder, [{"file_name": name, "caption": folder}])
    (tmp_path / "y" / "p.png").write_bytes(png())
    first, second = read_all(f"folder:{tmp_path}")
    assert isinstance(first, Example) and (first.key, first.captions) == ("y/p", ("x",))
    assert isinstance(second, Skipped) and second.reason == "picture of two listings"


def test_a_picture_that_is_called_as_a_line_is_labelled(tmp_path):
    write_listing(tmp_path, [{"file_name": "line 2", "caption": "c"}])
    (tmp_path / "line 2").write_bytes(png())
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.write("\n{bad}\n")
    items = read_all(f"folder:{tmp_path}")
    assert [type(item) for item in items] == [Example, Skipped]


def test_a_second_caption_file_is_listed(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for name in ("a.txt", "a.TXT", "b.txt", "b.TXT"):
        (tmp_path / name).write_text(name)
    items = read_all(f"folder:{tmp_path}")
    assert [item.captions for item in items if isinstance(item, Example)] == [("a.txt",)]
    reasons = sorted(item.reason for item in items if isinstance(item, Skipped))
    assert reasons == ["no picture", "second caption file", "second caption file"]


def test_keys_of_parquet_files(tmp_path):
    for name in ("x.parquet", "x.pq", "y.parquet"):
        pq.write_table(pa.table({"image": [png()], "text": ["a"]}), tmp_path / name)
    keys = [item.key for item in read_all(f"parquet:{tmp_path}/*")]
    assert keys == ["x.parquet#0", "x.pq#0", "y#0"]


def test_captions_that_show_nothing_are_none():
    nothing = ("", " ", "\u200b", "\u2060 \ufeff", "\u202e\u202c", "\x00", None, 7)
    assert clean_captions(nothing) == ()
    assert clean_captions(("\u200bx", " 👩\u200d🎨 ")) == ("\u200bx", "👩\u200d🎨")


@pytest.mark.parametrize("kind", ["TGA", "BMP"])
def test_a_fourth_byte_that_means_nothing(kind):
    """Programs without transparency leave zeros there."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3] = (200, 100, 50)
    encoded = io.BytesIO()
    Image.fromarray(rgba).save(encoded, kind)
    data = bytearray(encoded.getvalue())
    if kind == "BMP":  # a header of version 5 with a mask for the alpha, which Pillow does not write
        pixels = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
        masks = b"".join(mask.to_bytes(4, "little") for mask in (0xFF0000, 0xFF00, 0xFF, 0xFF000000))
        header = b"".join(
            number.to_bytes(size, "little")
            for number, size in (
                *((124, 4), (8, 4), (8, 4), (1, 2), (32, 2), (3, 4), (len(pixels), 4)),
                *((2835, 4), (2835, 4), (0, 4), (0, 4)),
            )
        )
        header = header + masks + b"BGRs" + bytes(124 - len(header) - len(masks) - 4)
        start = 14 + len(header)
        data = b"BM" + (start + len(pixels)).to_bytes(4, "little") + bytes(4) + start.to_bytes(4, "little")
        data += header + pixels
    assert Image.open(io.BytesIO(bytes(data))).mode == "RGBA"
    shown = np.asarray(decode_picture(bytes(data)))
    np.testing.assert_array_equal(shown, np.broadcast_to([200, 100, 50], (8, 8, 3)))
