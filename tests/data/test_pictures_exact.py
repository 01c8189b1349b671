"""The fast way through OpenCV gives what the one path gives, or nothing, over all that a JPEG may say of itself."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from imagen_jax.data import pictures
from imagen_jax.sizes import Size

SIDE = 48
ADOBE = b"Adobe\0\x64\0\0\0\0"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photograph(height=SIDE, width=67, mode="RGB"):
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    rows, columns = np.indices((height, width)) / 16
    waves = np.stack([127 + 60 * np.sin(rows + i) + 50 * np.cos(columns * 1.3 - i) for i in range(3)], -1)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8)).convert(mode)


def jpeg(picture=None, **options):
    file = io.BytesIO()
    (picture or photograph()).save(file, "JPEG", **{"quality": 88, **options})
    return file.getvalue()


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_segments(data, *segments, jfif=True):
    """Puts segments behind the first, or in its place."""
    length = 2 + int.from_bytes(data[4:6], "big")
    return data[: 2 + length * jfif] + b"".join(segments) + data[2 + length :]


def exif(orientation, kind="SHORT", order="<"):
    number, code = {"BYTE": (1, "B"), "SHORT": (3, "H"), "LONG": (4, "I")}[kind]
    value = struct.pack(order + code, orientation).ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    return b"Exif\0\0" + start + struct.pack(order + "HHI", 0x112, number, 1) + value + bytes(4)


def xmp(orientation):
    text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return b"http://ns.adobe.com/xap/1.0/\0" + text.encode()


def assert_same(data, *, taken=True):
    """The fast way agrees with the other wherever it answers; `taken`: it has to answer."""
    exact = pictures.decode_exact(data, Size(SIDE, SIDE))
    assert (exact is not None) == taken
    if exact is not None:
        np.testing.assert_array_equal(exact, np.asarray(pictures.decode_picture(data, SIDE)))


@pytest.mark.parametrize("width", [48, 49, 63, 64, 67])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_sizes_and_subsamplings(width, subsampling):
    for options in (
        {},
        {"progressive": True},
        {"optimize": True},
        {"quality": 30},
        {"restart_marker_blocks": 2},
    ):
        assert_same(jpeg(photograph(width=width), subsampling=subsampling, **options))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        (cv2.IMWRITE_JPEG_RST_INTERVAL, 3),
        (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
    ],
)
def test_jpegs_of_another_encoder(flags):
    _, data = cv2.imencode(".jpg", np.asarray(photograph()), [cv2.IMWRITE_JPEG_QUALITY, 91, *flags])
    assert_same(data.tobytes())


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientations(orientation):
    for kind in ("SHORT", "LONG", "BYTE"):
        for order in "<>":
            assert_same(jpeg(exif=exif(orientation, kind, order)))
    assert_same(with_segments(jpeg(), segment(0xE1, xmp(orientation))))
    assert_same(with_segments(jpeg(exif=exif(3)), segment(0xE1, xmp(orientation))))
    # Metadata may come in any order, and behind the tables.
    data = with_segments(jpeg(), segment(0xFE, b"a comment"), segment(0xE1, exif(orientation)), jfif=False)
    assert_same(data)
    late = jpeg()
    start = late.index(b"\xff\xda")
    assert_same(late[:start] + segment(0xE1, exif(orientation)) + late[start:])


@pytest.mark.parametrize("metadata", [b"Exif\0\0", b"Exif\0\0nonsense", exif(6)[:18], b"", b"\xff" * 40])
def test_broken_metadata(metadata):
    assert_same(with_segments(jpeg(), segment(0xE1, metadata)))


def test_colour_models():
    bare = with_segments(jpeg(), jfif=False)
    assert_same(bare)
    for keep in (True, False):
        assert_same(with_segments(jpeg(), segment(0xEE, ADOBE + b"\1"), jfif=keep))
    # RGB as it is, by Adobe's marker or by the names of its components; and other names.
    for keep in (True, False):
        assert_same(with_segments(jpeg(keep_rgb=True), segment(0xEE, ADOBE + b"\0"), jfif=keep), taken=False)
    assert_same(jpeg(keep_rgb=True), taken=False)
    frame = bare.index(b"\xff\xc0") + 10
    scan = bare.index(b"\xff\xda") + 5
    for names in (b"RGB", b"\0\1\2"):
        named = bytearray(bare)
        named[frame : frame + 9 : 3] = named[scan : scan + 6 : 2] = names
        assert pictures.picture_fault(bytes(named)) is None
        assert_same(bytes(named), taken=False)
    for mode in ("L", "CMYK"):
        assert_same(jpeg(photograph(mode=mode)), taken=False)
    # YCCK
    assert_same(with_segments(jpeg(), segment(0xEE, ADOBE + b"\2")), taken=False)


def test_profiles():
    assert_same(jpeg(icc_profile=SRGB))
    assert_same(jpeg(icc_profile=SRGB, exif=exif(6)))
    assert_same(jpeg(icc_profile=b"broken" * 50))
    # The colourants of red and blue exchanged.
    red, blue = SRGB.index(b"rXYZ"), SRGB.index(b"bXYZ")
    swapped = bytearray(SRGB)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    data = jpeg(icc_profile=bytes(swapped))
    assert_same(data, taken=False)
    shown = np.asarray(pictures.decode_picture(data)).astype(int)
    assert np.abs(shown - np.asarray(pictures.decode_picture(jpeg()))[..., ::-1]).mean() < 4
    # In two parts, of which one is missing: ignored by both.
    part = b"ICC_PROFILE\0\1\2" + bytes(swapped)[:200]
    assert_same(with_segments(jpeg(), segment(0xE2, part)))


def test_of_several_pictures_in_a_file_the_first():
    file = io.BytesIO()
    photograph().save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (67, SIDE))])
    assert_same(file.getvalue())
    assert_same(jpeg() + jpeg(Image.new("RGB", (67, SIDE))))


def test_damage():
    """Where OpenCV decodes more than Pillow does, records were checked by Pillow; where both do, the pixels agree."""
    rng = np.random.default_rng(0)
    data, compared = jpeg(exif=exif(6)), 0
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(0, len(data))] = rng.integers(0, 256)
        broken = bytes(broken)
        if (
            pictures.picture_fault(broken) is None
            and pictures.decode_exact(broken, Size(SIDE, SIDE)) is not None
        ):
            assert_same(broken)
            compared += 1
    assert compared > 50
