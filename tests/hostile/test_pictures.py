"""PNGs whose record, or whose pixels, somebody else made: named, and never the end of the command."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.hostile.mutations import DEEP, HALF, HUGE, JSON_KINDS, mutated_json

# A record may go without these, or have others: texts that are only said, and fields with a default.
EITHER = ("missing", "NUL", "outside path", "negative", "null")
LIKE = ("sample", "--like=like.png", "--out=out")
OUT = ("sample", "a red circle", "--model=model", "--out=pictures_of_all")


def write_png(path, text):
    """A picture with this text, of any kind, in the place of its record."""
    path.unlink(missing_ok=True)
    info = PngInfo()
    info.add_itxt("imagen_jax", text)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, "PNG", pnginfo=info)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_a_spoilt_record(kind, place, run):
    with Image.open(place / "like.png") as image:
        content = json.loads(image.info["imagen_jax"])
    faults = []
    for what, text in mutated_json(content, kind, limit=60):
        write_png(place / "like.png", text)
        outcome = run(*LIKE)
        if outcome.reached and (what == f"seed = {HUGE}" or kind in EITHER):
            continue
        if fault := outcome.fault("like.png", "--model"):
            faults.append(f"{what}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} fields", *faults])


RECORDS = {
    "empty": "",
    "no JSON": "x",
    "a list": "[]",
    "a number": "7",
    "a text": '"x"',
    "null": "null",
    "an empty object": "{}",
    "deep": "[" * DEEP + "]" * DEEP,
    "half a character": '{"prompt": "\\ud800"}',
    "5000 digits": '{"seed": ' + "9" * 5000 + "}",
    "stages that are none": '{"stages": [7]}',
    "no stages": '{"stages": []}',
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_is_none(kind, place, run):
    write_png(place / "like.png", RECORDS[kind])
    fault = run(*LIKE).fault("like.png")
    assert not fault, fault


PICTURES = {
    "a bomb": png_of(100_000, 100_000, chunk(b"IDAT", zlib.compress(b"x"))),
    "no pixels": png_of(16, 16),
    "a size of nothing": png_of(0, 0, chunk(b"IDAT", zlib.compress(b""))),
    "a text bomb": png_of(
        16,
        16,
        chunk(b"zTXt", b"imagen_jax\0\0" + zlib.compress(b"[" * 10**8)),
        chunk(b"IDAT", zlib.compress(b"x")),
    ),
    "a broken text": png_of(16, 16, chunk(b"iTXt", b"imagen_jax\0\1\0\0\0x"), chunk(b"IDAT", b"x")),
    "text in Latin-1": png_of(16, 16, chunk(b"iTXt", b"imagen_jax\0\0\0\0\0\xff"), chunk(b"IDAT", b"x")),
    "half a header": b"\x89PNG\r\n\x1a\n\0\0",
    "no PNG": b"GIF89a" + bytes(100),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_is_none(kind, place, run):
    (place / "like.png").unlink()
    (place / "like.png").write_bytes(PICTURES[kind])
    fault = run(*LIKE).fault("like.png")
    assert not fault, fault


@pytest.mark.parametrize("kind", [*RECORDS, *PICTURES, "a folder", "a pipe"])
def test_a_foreign_picture_in_out_is_passed_over(kind, place, run):
    """The picture's name is taken by something else: the command goes on, beside it or in its place."""
    import os

    folder = place / "pictures_of_all"
    folder.mkdir()
    path = folder / "00000-a-red-circle-0.png"
    if kind in RECORDS:
        write_png(path, RECORDS[kind])
    elif kind in PICTURES:
        path.write_bytes(PICTURES[kind])
    elif kind == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    outcome = run(*OUT)
    assert not outcome.raised, outcome.raised
    assert outcome.reached or not outcome.fault("00000-a-red-circle-0.png"), outcome


@pytest.mark.parametrize("text", [HALF, "\0", "", " ", "x" * 100_000, "\u2028", "\x1b[31m"])
def test_a_prompt(text, run):
    outcome = run("sample", text, "--model=model", "--out=out")
    assert outcome.reached or not outcome.fault(), outcome
