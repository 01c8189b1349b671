"""What decoded pictures show: transparency, ranges, orientation, first frames, damage. Files are made by hand."""

import io
import itertools
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import pictures

RNG = np.random.default_rng(0)
WHITE = (255, 255, 255)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def decoded(data, **options):
    return np.asarray(pictures.decode_picture(data, **options)).astype(int)


def on_white(colours, opacity):
    """The definition: colour · opacity + white · (1 - opacity); 8 bits."""
    share = opacity[..., None] / 255
    return colours * share + 255 * (1 - share)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, depth, colour_type, *extra):
    """A PNG of samples (height, width, channels) as its specification writes them."""
    height, width, _ = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=-1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(samples, order="<", **tags):
    """An uncompressed TIFF of samples (height, width, channels); tags by number as t258=(type, values)."""
    height, width, channels = samples.shape
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = samples.dtype.itemsize * 8
    entries = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [1]),
        262: (3, [2 if channels > 2 else 1]),
        273: (4, [8]),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(data)]),
    }
    entries |= {int(name[1:]): value for name, value in tags.items()}
    formats = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B"}
    place, later = 8 + len(data), b""
    end = place + 2 + 12 * len(entries) + 4
    directory = struct.pack(order + "H", len(entries))
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(order + formats[kind] * len(values), *values)
        if len(packed) > 4:
            later, packed = later + packed, struct.pack(order + "I", end + len(later))
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", place)
    return start + data + directory + struct.pack(order + "I", 0) + later


def samples(depth, channels, shape=(6, 8)):
    return RNG.integers(0, 2**depth, (*shape, channels))


# Transparency.


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_is_transparent(depth):
    grey = samples(depth, 1)
    transparent = int(grey[2, 3, 0])
    data = png(grey, depth, 0, chunk(b"tRNS", struct.pack(">H", transparent)))
    colours = np.round(np.repeat(grey, 3, -1) * (255 / (2**depth - 1)))
    expected = np.where(grey == transparent, 255, colours)
    np.testing.assert_allclose(decoded(data), expected, atol=0.5)


def test_spare_bits_of_a_transparent_grey_mean_nothing():
    grey = samples(8, 1)
    data = png(grey, 8, 0, chunk(b"tRNS", struct.pack(">H", 0x4200 | int(grey[0, 0, 0]))))
    assert (decoded(data)[0, 0] == 255).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_that_is_transparent(depth):
    colours = samples(depth, 3)
    colours[0, :3] = (0, 0, 0)
    # One that agrees in the upper bits only, or in two channels of three.
    colours[0, 1] = (1, 0, 0)
    data = png(colours, depth, 2, chunk(b"tRNS", bytes(6)))
    shown = decoded(data)
    transparent = (colours == 0).all(-1)
    assert (shown[transparent] == 255).all() and transparent[0, 0] and not transparent[0, 1]
    expected = colours[~transparent] / (1 if depth == 8 else 257)
    np.testing.assert_allclose(shown[~transparent], expected, atol=1)
    # As OpenCV, whose libpng makes an alpha channel of it.
    alpha = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., 3]
    np.testing.assert_array_equal(alpha == 0, transparent)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_with_opacities(depth):
    index = samples(depth, 1)
    palette = RNG.integers(0, 256, (2**depth, 3)).astype(np.uint8)
    opacity = RNG.integers(0, 256, 2**depth).astype(np.uint8)
    opacity[1] = 0
    extra = chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", opacity.tobytes())
    shown = decoded(png(index, depth, 3, *extra))
    expected = on_white(palette[index[..., 0]].astype(float), opacity[index[..., 0]].astype(float))
    np.testing.assert_allclose(shown, expected, atol=1)


@pytest.mark.parametrize(("depth", "colour_type", "channels"), [(8, 4, 2), (16, 4, 2), (8, 6, 4), (16, 6, 4)])
def test_png_alpha(depth, colour_type, channels):
    values = samples(depth, channels)
    shown = decoded(png(values, depth, colour_type))
    scaled = values / (1 if depth == 8 else 257)
    colours = np.broadcast_to(scaled[..., :-1], (*scaled.shape[:2], 3))
    np.testing.assert_allclose(shown, on_white(colours, scaled[..., -1]), atol=1.6)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "TIFF", "JPEG2000", "TGA", "BMP", "ICO", "GIF"])
def test_alpha_of_other_formats(kind):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., :3] = (200, 100, 50)
    rgba[:16, :, 3] = 255
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 95}, "ICO": {"sizes": [(32, 32)]}}.get(
        kind, {}
    )
    shown = decoded(encoded(Image.fromarray(rgba), kind, **options))
    near = 4 if kind == "AVIF" else 0
    assert np.abs(shown[:14] - (200, 100, 50)).max() <= near
    if kind != "BMP":  # written without its alpha
        assert np.abs(shown[18:] - 255).max() <= near


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("associated", [True, False])
def test_tiff_alpha(order, dtype, associated):
    top = np.iinfo(dtype).max
    colours = RNG.integers(0, top, (6, 8, 3), endpoint=True)
    opacity = RNG.choice([0, top // 2, top], (6, 8, 1))
    stored = (colours * (opacity / top) if associated else colours).round()
    data = tiff(
        np.concatenate([stored, opacity], -1).astype(dtype), order, t338=(3, [1 if associated else 2])
    )
    expected = on_white(colours * (255 / top), opacity[..., 0] * (255 / top))
    np.testing.assert_allclose(decoded(data), expected, atol=2)


def test_tiff_grey_with_associated_alpha():
    stored = np.array([[[100, 200], [0, 0], [255, 255]]], np.uint8)
    data = tiff(stored, t338=(3, [1]), t262=(3, [1]))
    # 100 / 200 of full grey, seen at 200 / 255.
    np.testing.assert_allclose(decoded(data)[0, :, 0], [127.5 * 200 / 255 + 55, 255, 255], atol=1)


def test_channels_that_are_not_alpha_are_left_out():
    values = samples(8, 4).astype(np.uint8)
    np.testing.assert_array_equal(decoded(tiff(values, t338=(3, [0]))), values[..., :3])


@pytest.mark.parametrize("grey", [True, False])
def test_transparent_gif(grey):
    palette = np.repeat(np.arange(4)[:, None] * 85, 3, 1) if grey else RNG.integers(0, 256, (4, 3))
    index = RNG.integers(0, 4, (5, 7)).astype(np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette(palette.astype(np.uint8).tobytes())
    shown = decoded(encoded(picture, "GIF", transparency=2, optimize=False))
    np.testing.assert_array_equal(shown, np.where(index[..., None] == 2, 255, palette[index]))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_pictures_the_first(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "AVIF" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(decoded(data) - (255, 0, 0)).max() <= 4


def test_of_an_mpo_the_first():
    frames = [Image.new("RGB", (16, 16), grey) for grey in ("#303030", "#a0a0a0")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data) - 0x30).max() <= 2


def test_a_first_frame_that_does_not_fill_its_gif():
    part = encoded(Image.new("P", (4, 4), 0), "GIF")
    place = part.index(b",\0\0\0\0")
    # Screen of 8 × 8, the frame at (2, 3).
    data = (
        part[:6]
        + struct.pack("<HH", 8, 8)
        + part[10 : place + 1]
        + struct.pack("<HH", 2, 3)
        + part[place + 5 :]
    )
    shown = decoded(data)
    assert shown.shape == (8, 8, 3) and (shown[3:7, 2:6] == 0).all() and shown.sum() == (64 - 16) * 3 * 255


# Ranges.


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bits_of_tiff(order):
    grey = samples(16, 1).astype(np.uint16)
    expected = np.repeat(np.round(grey / 257.0), 3, -1)
    np.testing.assert_allclose(decoded(tiff(grey, order)), expected, atol=0.5)
    colours = samples(16, 3).astype(np.uint16)
    np.testing.assert_allclose(decoded(tiff(colours, order)), colours / 257.0, atol=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero(dtype):
    top = np.iinfo(dtype).max
    grey = RNG.integers(0, top, (6, 8, 1), endpoint=True).astype(dtype)
    shown = decoded(tiff(grey, t262=(3, [0])))
    np.testing.assert_allclose(shown[..., :1], 255 - grey * (255 / top), atol=0.5)
    theirs = cv2.imdecode(np.frombuffer(tiff(grey, t262=(3, [0])), np.uint8), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_allclose(shown[..., 0], theirs, atol=1)


def test_twelve_bits_of_tiff():
    grey = np.array([[0, 4095, 2048, 1000]])
    bits = np.unpackbits(grey.astype(">u2").view(np.uint8).reshape(1, 4, 2), axis=-1).reshape(1, 4, 16)[
        ..., 4:
    ]
    data = tiff(np.packbits(bits.reshape(1, -1), axis=-1)[..., None], t256=(4, [4]), t258=(3, [12]))
    np.testing.assert_allclose(decoded(data)[0, :, 0], grey[0] * (255 / 4095), atol=0.5)


@pytest.mark.parametrize("top", [255, 1023, 65535])
def test_portable_grey_maps(top):
    grey = RNG.integers(0, top, (3, 5), endpoint=True)
    data = b"P5 5 3 %d\n" % top + grey.astype(np.uint8 if top < 256 else ">u2").tobytes()
    np.testing.assert_allclose(decoded(data)[..., 0], grey * (255 / top), atol=0.6)


def test_jpeg2000_of_sixteen_bits():
    grey = samples(16, 1, (32, 32)).astype(np.uint16)
    data = encoded(Image.fromarray(grey[..., 0]), "JPEG2000")
    np.testing.assert_allclose(decoded(data)[..., 0], grey[..., 0] / 257.0, atol=1)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32, np.int16, np.int8])
@pytest.mark.parametrize("photometric", [0, 1])
def test_numbers_of_unknown_range_are_refused(dtype, photometric):
    kind = {"f": 3, "i": 2, "u": 1}[np.dtype(dtype).kind]
    data = tiff(samples(7, 1).astype(dtype), t339=(3, [kind]), t262=(3, [photometric]))
    fault = pictures.picture_fault(data)
    if photometric == 1:
        assert fault.endswith("of unknown range")
    assert fault is not None
    grey = Image.fromarray(samples(7, 1)[..., 0].astype(np.float32))
    assert "32-bit grey of unknown range" in pictures.picture_fault(encoded(grey, "TIFF"))
    assert pictures.picture_fault(b"Pf\n2 1\n-1.0\n" + bytes(8)) == "32-bit grey of unknown range"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_modes_of_tiff(mode):
    rows, columns = 80 + np.indices((16, 16)) * 6
    colours = Image.fromarray(np.stack([rows, columns, 250 - rows], -1).astype(np.uint8))
    picture = colours.convert(mode)
    near = {"LAB": 6, "YCbCr": 3}.get(mode, 1)
    expected = np.asarray(colours if mode in ("LAB", "YCbCr", "CMYK") else picture.convert("RGB")).astype(int)
    assert np.abs(decoded(encoded(picture, "TIFF")) - expected).max() <= near


# Orientation: (rows reversed, columns reversed, then transposed) of what EXIF numbers, by its specification.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
EXIF_TYPES = {"SHORT": (3, "H"), "BYTE": (1, "B"), "LONG": (4, "I"), "UNDEFINED": (7, "B"), "SLONG": (9, "i")}


def exif(orientation, kind="SHORT", order="<"):
    number, code = EXIF_TYPES[kind]
    value = struct.pack(order + code, orientation).ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    return b"Exif\0\0" + start + struct.pack(order + "HHI", 0x112, number, 1) + value + bytes(4)


XMPS = {
    "attribute": '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{}"/></x:xmpmeta>',
    "single": "<x:xmpmeta xmlns:x='adobe:ns:meta/'><r tiff:Orientation = '{}'/></x:xmpmeta>",
    "element": "<x:xmpmeta><tiff:Orientation>{}</tiff:Orientation></x:xmpmeta>",
}


def quarters(height=32, width=48):
    """Four flat quarters, in blocks that no codec smears."""
    grey = np.zeros((height, width, 3), np.uint8)
    grey[: height // 2, width // 2 :] = 80
    grey[height // 2 :, : width // 2] = 160
    grey[height // 2 :, width // 2 :] = 240
    return grey


def assert_turned(data, orientation, side=None):
    shown = decoded(data, smallest=side)
    expected = TURNS[orientation](quarters())
    if side is not None:
        expected = expected[:: 32 // (2 * side), :: 32 // (2 * side)]
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 2


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_orientation(kind, orientation):
    for type_, order in itertools.product(EXIF_TYPES, "<>"):
        data = encoded(Image.fromarray(quarters()), kind, quality=95, exif=exif(orientation, type_, order))
        assert_turned(data, orientation)
        if kind == "JPEG":
            assert_turned(data, orientation, side=4)
        if kind == "AVIF":
            break  # its own boxes say it, whatever the type was


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("xmp", XMPS)
def test_xmp_orientation(orientation, xmp):
    text = XMPS[xmp].format(orientation).encode()
    for kind in ("JPEG", "WEBP"):
        assert_turned(encoded(Image.fromarray(quarters()), kind, quality=95, xmp=text), orientation)
    kind = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)
    assert_turned(png(quarters(), 8, 2, kind), orientation)
    # EXIF says it first.
    data = encoded(Image.fromarray(quarters()), "JPEG", quality=95, xmp=text, exif=exif(1))
    assert_turned(data, 1)


@pytest.mark.parametrize("orientation", TURNS)
def test_tiff_orientation(orientation):
    for kind, order in itertools.product((3, 4), "<>"):
        assert_turned(tiff(quarters(), order, t274=(kind, [orientation])), orientation)
    packed = encoded(Image.fromarray(quarters()), "TIFF", compression="tiff_lzw", tiffinfo={274: orientation})
    assert_turned(packed, orientation)


@pytest.mark.parametrize(
    "metadata",
    [
        b"Exif\0\0",
        b"Exif\0\0nonsense",
        exif(6)[:20],
        exif(0),
        exif(9),
        exif(200),
        exif(6).replace(b"*", b"?"),
    ],
)
def test_metadata_that_cannot_be_read_turn_nothing(metadata):
    for kind in ("JPEG", "PNG", "WEBP"):
        assert_turned(encoded(Image.fromarray(quarters()), kind, quality=95, exif=metadata), 1)


# Damage and hostility.


def big_png(width, height):
    return png(np.zeros((1, 1, 1)), 8, 0).replace(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
    )


@pytest.mark.parametrize(
    ("width", "height"), [(9_460, 9_460), (13_000, 13_000), (60_000, 60_000), (2**31 - 1, 1)]
)
def test_too_many_pixels_are_a_fault_before_memory_is_asked_for(width, height):
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        fault = pictures.picture_fault(big_png(width, height))
        bitmap = b"BM" + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        assert pictures.picture_fault(bitmap) == f"more than {pictures.MAX_PIXELS} pixels"
    assert fault == f"more than {pictures.MAX_PIXELS} pixels"
    assert not caught
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.picture_fault(big_png(width, height)) == fault


def test_memory_is_not_asked_for():
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((9_460, 9_460), (60_000, 60_000)):
        pictures.picture_fault(big_png(*size))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # kilobytes


def test_bombs_in_chunks_of_text_are_faults():
    bomb = zlib.compress(bytes(2**26))
    for extra in (chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb)):
        assert "\n" not in pictures.picture_fault(png(samples(8, 3), 8, 2, extra))


def test_postscript_is_not_run():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert pictures.picture_fault(program) == "PostScript, which is not read"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"not a picture", bytes(range(64))])
def test_what_is_no_picture_has_the_same_fault_in_every_run(data):
    assert {pictures.picture_fault(data) for _ in range(3)} == {"cannot identify image file"}


def test_damage_of_any_kind_is_a_fault_and_no_exception():
    """Bytes changed and cut off at random in every format: faults or pictures, never anything else."""
    whole = [
        encoded(Image.fromarray(quarters()), kind, **options)
        for kind, options in {
            "PNG": {},
            "JPEG": {"exif": exif(6)},
            "GIF": {},
            "WEBP": {},
            "TIFF": {"compression": "tiff_lzw"},
            "AVIF": {},
            "BMP": {},
            "TGA": {},
            "JPEG2000": {},
            "PCX": {},
            "ICO": {"sizes": [(32, 32)]},
            "DDS": {},
            "QOI": {},
        }.items()
    ] + [tiff(quarters()), png(quarters(), 8, 2, chunk(b"tRNS", bytes(6)))]
    for data in whole:
        assert pictures.picture_fault(data) is None
        for _ in range(40):
            broken = bytearray(data[: RNG.integers(8, len(data))] if RNG.random() < 0.3 else data)
            for _ in range(RNG.integers(1, 8)):
                broken[RNG.integers(0, min(len(broken), 200))] = RNG.integers(0, 256)
            fault = pictures.picture_fault(bytes(broken))
            assert fault is None or (fault and "\n" not in fault and " at 0x" not in fault)
