"""PNGs of strangers in --out and as --like: named in one line, never decoded, never overwritten."""

import dataclasses
import io
import json
import os
import random
import struct
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagen_jax.errors import UserError
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.sampling.output import beside, find_place, save_picture, write_grid
from imagen_jax.sampling.pictures import METADATA_KEY, read_metadata
from imagen_jax.sampling.record import PictureRecord, StageRecord, read_record

RECORD = PictureRecord(
    prompt="a red circle",
    seed=3,
    stages=(StageRecord(name="base", identity="aa", sampling=SamplingConfig()),),
    text_encoder="ee",
    model="model",
)
NAME = "00000-a-red-circle-3.png"
FIELDS = RECORD.to_metadata()


def png(text=None, *, compressed=False):
    """A PNG file with this text in the chunk of the records."""
    info, buffer = PngInfo(), io.BytesIO()
    if text is not None:
        info.add_itxt(METADATA_KEY, text, zip=compressed)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sized(content, width, height):
    """The file with another size in its header."""
    return content[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + content[24:29]) + content[33:]


GOOD = png(json.dumps(FIELDS))
FOREIGN = {
    "no record": (png(), "is not a PNG of imagen-jax sample"),
    "a newer format": (
        png(json.dumps({**FIELDS, "format": 2, "new": 1})),
        "format 2; this version reads up to 1",
    ),
    "a format of another type": (
        png(json.dumps({**FIELDS, "format": "2"})),
        "'format' must be a whole number",
    ),
    "a list": (png("[1, 2]"), "must be a JSON object"),
    "a number": (png("3"), "must be a JSON object"),
    "no JSON": (png("{"), "is not valid JSON"),
    "a number of many digits": (png('{"seed": ' + "9" * 5000 + "}"), "is not valid JSON"),
    "deep JSON": (png("[" * 200_000), "nested too deeply"),
    "half a character": (png('{"prompt": "\\ud83c"}'), "lone surrogate"),
    "another type": (png(json.dumps({**FIELDS, "stages": "base"})), "stages must be a list"),
    "no stage": (png(json.dumps({**FIELDS, "stages": []})), "one stage at least"),
    "an unknown field": (png(json.dumps({**FIELDS, "sead": 1})), "sead is not a field"),
    "many pixels": (sized(GOOD, 60_000, 60_000), "60000×60000 pixels"),
    "a text that swells": (png("x" * 2**26, compressed=True), "is not a readable picture"),
    "a text": (b"no picture", "is not a readable picture"),
    "nothing": (b"", "is not a readable picture"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "is not a readable picture"),
    "half of somebody's PNG": (png()[:30], "is not a readable picture"),
    "no pixels": (GOOD[:33] + chunk(b"IEND", b""), "is not a readable picture"),
}


def one_line(raised, path):
    said = str(raised.value)
    assert str(path) in said and "\n" not in said and len(said) < 400
    return said


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_strangers_picture_is_named_and_stays(tmp_path, kind):
    content, said = FOREIGN[kind]
    path = tmp_path / NAME
    path.write_bytes(content)
    if kind != "no pixels":  # which only matters to who looks for them
        with pytest.raises(UserError) as raised:
            read_record(path)
        message = one_line(raised, path)
        assert message.startswith(f"--like {path}") and said in message
    place = find_place(epath.Path(tmp_path), 0, RECORD)
    assert (place.path.name, place.there, place.damaged) == ("00000-a-red-circle-3-2.png", False, False)
    (difference,) = beside(place) or [""]
    assert kind == "no pixels" or difference.startswith(str(path))
    save_picture(place, np.zeros((8, 8, 3), np.uint8))
    assert path.read_bytes() == content and find_place(epath.Path(tmp_path), 0, RECORD).there


def test_what_is_no_file_at_all_stays(tmp_path):
    (tmp_path / NAME).mkdir()
    os.mkfifo(tmp_path / NAME.replace("3.png", "3-2.png"))
    place = find_place(epath.Path(tmp_path), 0, RECORD)
    assert place.path.name == "00000-a-red-circle-3-3.png"
    for path, said in (
        (tmp_path / NAME, "Is a directory"),
        (tmp_path / NAME.replace("3.png", "3-2.png"), "a pipe or a device"),
        ("http://host/a.png", "http://: only local paths and those of gs:// and s3:// are known"),
        ("foo://host/a.png", "foo://: only local paths and those of gs:// and s3:// are known"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            read_record(path)
        one_line(raised, path)


def test_a_cut_or_changed_picture_of_this_program_is_drawn_again(tmp_path):
    folder = epath.Path(tmp_path)
    save_picture(find_place(folder, 0, RECORD), np.zeros((8, 8, 3), np.uint8))
    whole = (tmp_path / NAME).read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        if draw.random() < 0.5:
            del content[draw.randrange(64, len(whole) - 8) :]
        else:
            content[draw.randrange(64, len(whole) - 8)] ^= 1 << draw.randrange(8)
        (tmp_path / NAME).write_bytes(content)
        place = find_place(folder, 0, RECORD)
        assert (place.path.name, place.there, place.damaged) == (NAME, False, True)


def test_any_damage_is_one_line(tmp_path):
    """Bytes changed anywhere, in files with many kinds of chunks: nothing but `UserError` ever comes out."""
    buffer = io.BytesIO()
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(FIELDS), zip=True)
    info.add_text("comment", "x" * 100, zip=True)
    Image.new("P", (8, 8)).save(
        buffer, "PNG", pnginfo=info, icc_profile=bytes(200), dpi=(72, 72), exif=b"Exif\0\0" + bytes(20)
    )
    draw, path = random.Random(1), tmp_path / "a.png"
    for number in range(400):
        content = bytearray((buffer.getvalue(), GOOD)[number % 2])
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(8, len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(len(content))] if draw.random() < 0.3 else content)
        for whole in (False, True):
            try:
                read_metadata(path, whole=whole)
            except UserError as error:
                assert str(path) in str(error)


def test_a_picture_that_somebody_resized_is_shown(tmp_path):
    places = []
    for seed, side in ((3, 8), (4, 20)):
        places.append(find_place(epath.Path(tmp_path), 0, dataclasses.replace(RECORD, seed=seed)))
        save_picture(places[-1], np.zeros((side, side, 3), np.uint8))
    assert write_grid(epath.Path(tmp_path / "grid.png"), places, 2) == 2
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (22, 12)
