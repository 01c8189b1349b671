"""ICC profiles, written by hand after ICC.1:2001-04 (version 2), against the formulas that they stand for."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from imagen_jax.data import pictures
from imagen_jax.sizes import Size

# Primaries of sRGB, adapted to D50, and its curve (IEC 61966-2-1).
PRIMARIES = {b"r": (0.4360, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7141)}
D50 = (0.9642, 1.0, 0.8249)


def to_light(value):
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def from_light(light):
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def numbers(*values):
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(values):
    return b"XYZ \0\0\0\0" + numbers(*values)


def curve(function):
    table = np.round(function(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()


def profile(space, tags, *, connection=b"XYZ ", kind=b"mntr"):
    tags = {b"wtpt": xyz(D50)} | tags
    place, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        entries += name + struct.pack(">II", place + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12s4s", place + len(body), b"", 0x02400000, kind, space, connection, b"", b"acsp"
    )
    header = header.ljust(68, b"\0") + numbers(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


def rgb_profile(primaries="rgb", function=to_light):
    tags = {}
    for name, primary in zip(b"rgb", primaries.encode()):
        tags[bytes([name]) + b"XYZ"] = xyz(PRIMARIES[bytes([primary])])
        tags[bytes([name]) + b"TRC"] = curve(function)
    return profile(b"RGB ", tags)


SRGB = rgb_profile()
LINEAR = rgb_profile(function=lambda value: value)
SWAPPED = rgb_profile("bgr")
GREY_GAMMA = 1.8  # of old Macintoshes
GREY = profile(b"GRAY", {b"kTRC": curve(lambda value: value**GREY_GAMMA)})


def cmyk_profile():
    """Paper is black, and full ink of all four white: the opposite of what is taken without a profile."""
    steps = np.arange(256, dtype=np.uint8).tobytes()
    lightness = np.indices((2, 2, 2, 2)).sum(0).reshape(-1) * 255 / 4
    lab = np.stack([lightness, np.full(16, 128), np.full(16, 128)], -1).round().astype(np.uint8)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += steps * 4 + lab.tobytes() + steps * 3
    return profile(b"CMYK", {b"A2B0": table}, connection=b"Lab ", kind=b"prtr")


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def decoded(data, **options):
    return np.asarray(pictures.decode_picture(data, **options)).astype(int)


def colours(channels=3):
    return np.random.default_rng(1).integers(0, 256, (16, 16, channels)).astype(np.uint8)


def brightened(values):
    """What numbers that are proportional to light look like in sRGB."""
    return 255 * from_light(values / 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_profiles_are_converted(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = colours()
    picture = Image.fromarray(pixels)
    linear = decoded(encoded(picture, kind, icc_profile=LINEAR, **options))
    np.testing.assert_allclose(linear, brightened(pixels), atol=2)
    swapped = decoded(encoded(picture, kind, icc_profile=SWAPPED, **options))
    np.testing.assert_allclose(swapped, pixels[..., ::-1], atol=2)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_profiles_of_lossy_formats_at_every_size(kind):
    rows, columns = np.indices((64, 64))
    pixels = np.stack([rows * 2 + 60, columns * 2 + 60, 200 - rows], -1).astype(np.uint8)
    data = encoded(Image.fromarray(pixels), kind, quality=98, icc_profile=SWAPPED)
    assert np.abs(decoded(data) - pixels[..., ::-1]).mean() < 3
    small = pictures.resize(pictures.decode_picture(data, 8), Size(8, 8)).astype(int)
    whole = pictures.resize(pictures.decode_picture(data), Size(8, 8)).astype(int)
    assert np.abs(small - whole).max() <= 4


def test_opacity_and_palette_are_as_without_a_profile():
    pixels = colours(4)
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, 255)
    shown = decoded(encoded(Image.fromarray(pixels), "PNG", icc_profile=LINEAR))
    expected = np.where(pixels[..., 3:] == 0, 255, brightened(pixels[..., :3]))
    np.testing.assert_allclose(shown, expected, atol=2)
    index = colours(1)[..., 0] % 4
    picture = Image.fromarray(index)
    palette = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 0], [90, 90, 250]], np.uint8)
    picture.putpalette(palette.tobytes())
    shown = decoded(encoded(picture, "PNG", icc_profile=LINEAR, transparency=2))
    expected = np.where(index[..., None] == 2, 255, brightened(palette[index]))
    np.testing.assert_allclose(shown, expected, atol=2)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profiles_of_grey(mode):
    grey = colours(1)[..., 0]
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    picture = wide if mode == "I;16" else Image.fromarray(grey).convert(mode)
    shown = decoded(encoded(picture, "PNG", icc_profile=GREY))
    expected = 255 * from_light((grey / 255) ** GREY_GAMMA)
    np.testing.assert_allclose(shown, np.repeat(expected[..., None], 3, -1), atol=2)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_with_and_without_a_profile(kind):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[8:] = 255
    picture = Image.frombytes("CMYK", (16, 16), ink.tobytes())
    options = {"quality": 95} if kind == "JPEG" else {}
    plain = decoded(encoded(picture, kind, **options))
    assert plain[:8].min() >= 250 and plain[8:].max() <= 5
    shown = decoded(encoded(picture, kind, icc_profile=cmyk_profile(), **options))
    assert shown[:8].max() <= 5 and shown[8:].min() >= 250


def test_profiles_that_are_srgb_leave_every_pixel_alone():
    pixels = colours()
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in (SRGB, built_in):
        np.testing.assert_array_equal(
            decoded(encoded(Image.fromarray(pixels), "PNG", icc_profile=name)), pixels
        )


@pytest.mark.parametrize(
    "broken",
    [b"\0", b"nonsense" * 40, LINEAR[:200], LINEAR[:-300], LINEAR.replace(b"rTRC", b"none"), GREY],
)
def test_profiles_that_are_damaged_or_for_other_modes_are_ignored(broken):
    pixels = colours()
    np.testing.assert_array_equal(
        decoded(encoded(Image.fromarray(pixels), "PNG", icc_profile=broken)), pixels
    )
    grey = Image.fromarray(pixels[..., 0])
    np.testing.assert_array_equal(decoded(encoded(grey, "PNG", icc_profile=LINEAR))[..., 0], pixels[..., 0])
