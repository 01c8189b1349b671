"""Encoded pictures to square uint8 arrays: decoding, antialiased resizing, checking."""

import io
import re
import struct
import warnings
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from imagen_jax.data.picture_colours import needs_conversion, rgb_on_white
from imagen_jax.data.picture_kinds import register_heif
from imagen_jax.sizes import Size

register_heif()

# Everything that Pillow's decoders let out on damaged files; a warning where the caller has made errors of them.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    cv2.error,
    Image.DecompressionBombError,
    Warning,
)

# Pixels of the largest picture that is read: where Pillow begins to warn. Such a picture takes 0.36 GB, with
# transparency four times as much while it is converted, and as many are decoded at a time as there are threads.
MAX_PIXELS = 89_478_485
# Of one damaged file after another; what makes a picture unusable is raised.
warnings.filterwarnings("ignore", module=r"PIL\.")

# A picture that will be shrunk is decoded with at least so many pixels per pixel of the result, along one side:
# what Pillow's own thumbnails keep.
_DRAFT = 2


def decode_picture(data: bytes, smallest: int | None = None) -> Image.Image:
    """Decodes a whole picture to sRGB as viewers show it; of an animation the first frame.

    Transparency is laid over white, ICC profiles are converted to sRGB, 16 bits scaled to 8, and the picture is
    turned as EXIF or XMP says.

    Args:
      data: an encoded picture.
      smallest: side in pixels of the largest picture that will be made of it: a JPEG is then decoded at a
        half, a quarter or an eighth of its size where that leaves both sides twice as long, which saves most
        of the time and moves the centre by a quarter of a pixel of the result at most; None: at its own size.

    Raises:
      one of DECODE_ERRORS: the picture is damaged, cut off, of an unknown format, of more than `MAX_PIXELS`, or
        of numbers whose range is not known; `fault_text` says which.
    """
    with Image.open(io.BytesIO(data)) as opened:
        _check_header(opened)
        if smallest is not None:
            # Averages over blocks in the frequency domain; formats other than JPEG do not heed it.
            opened.draft(None, (_DRAFT * smallest, _DRAFT * smallest))
        frame = opened.tile[0].extents if opened.format == "GIF" else None
        opened.load()
        _check_header(opened)  # an icon's pictures are opened only now
        picture = rgb_on_white(opened, data)
        if frame is not None and frame != (0, 0, *picture.size):
            # Where the first frame of an animation draws nothing, it is transparent.
            whole = Image.new("RGB", picture.size, "white")
            whole.paste(picture.crop(frame), frame)
            picture = whole
        return _turned(picture, _orientation(opened))


def _check_header(opened: Image.Image) -> None:
    """Refuses what should not be decoded.

    Raises:
      ValueError: it is a program, which another program would have to run.
      Image.DecompressionBombError: it has too many pixels.
    """
    if opened.format == "EPS":
        raise ValueError("PostScript, which is not read")
    if opened.width * opened.height > MAX_PIXELS:
        raise Image.DecompressionBombError


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_SIDEWAYS = 5  # orientations from here on exchange height and width
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")


def _orientation(picture: Image.Image) -> int:
    """How a picture that was loaded has to be turned, as EXIF numbers it; of XMP only what EXIF does not say.

    The number may be of any of EXIF's types. Metadata that cannot be read turn nothing, as in viewers.
    """
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
        if isinstance(value, bytes):
            value = value.strip(b"\0")
        if isinstance(value, (bytes, str, tuple)):
            value = value[0]
        if value is not None:
            return int(value)
    except DECODE_ERRORS:
        pass
    xmp = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or b""
    match = _XMP_ORIENTATION.search(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp)
    return int(match[1]) if match else 1


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


# Start of frame: 8 bits a sample, height, width, three components; of any kind that Pillow reads too.
_FRAME = struct.Struct(">BHHB")
_FRAME_MARKERS = frozenset({0xC0, 0xC1, 0xC2})
_SCAN_MARKER, _JFIF_MARKER, _ADOBE_MARKER = 0xDA, 0xE0, 0xEE
_OTHER_APP_MARKERS = frozenset(range(0xE1, 0xF0)) - {_ADOBE_MARKER}
_ADOBE_YCBCR = 1  # the last byte of Adobe's marker


def _colour_jpeg(data: bytes) -> tuple[tuple[int, int], bool] | None:
    """What the markers of a JPEG of three 8-bit components in YCbCr say; None for anything else.

    Returns:
      height and width, as stored; whether there may be a profile or an orientation.
    """
    if data[:2] != b"\xff\xd8":
        return None
    size, components, known_colours, more = None, b"", False, False
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        segment = data[start + 4 : start + 2 + length]
        if marker in _FRAME_MARKERS and len(segment) == _FRAME.size + 9:
            bits, height, width, count = _FRAME.unpack_from(segment)
            size = (height, width) if (bits, count) == (8, 3) else None
            components = segment[_FRAME.size :: 3]
        elif marker == _JFIF_MARKER:
            known_colours = known_colours or segment[:5] == b"JFIF\0"
        elif marker == _ADOBE_MARKER:
            if segment[:5] != b"Adobe" or segment[11:] != bytes([_ADOBE_YCBCR]):
                return None
            known_colours = True
        elif marker == _SCAN_MARKER:
            # Without a marker decoders guess the colours by the components' names.
            ycbcr = known_colours or components == b"\1\2\3"
            return (size, more) if size is not None and ycbcr else None
        more = more or marker in _OTHER_APP_MARKERS
        start += 2 + length
    return None


def decode_exact(data: bytes, size: Size) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decodes a colour JPEG that is only to be cut, with OpenCV: the pixels of `decode_picture`.

    Such a picture is only cut, never resized, and decoding it is most of an input pipeline's work. Pillow needs
    half as long again, and longer still to hand the pixels over. Profile and orientation are those that Pillow
    finds.

    Args:
      data: an encoded picture.
      size: to which it is to be cut: it has one of its sides, and the other at least.

    Returns:
      values from 0 to 255, turned as EXIF or XMP says; None for any other picture, for one whose colours have to
      be converted and for one that OpenCV refuses, about which Pillow has more to say.
    """
    found = _colour_jpeg(data)
    if found is None or found[0][0] * found[0][1] > MAX_PIXELS:
        return None
    if not (_only_cut(found[0], size) or _only_cut(found[0][::-1], size)):
        return None
    orientation = 1
    if found[1]:
        with Image.open(io.BytesIO(data)) as opened:
            if needs_conversion(opened):
                return None
            orientation = _orientation(opened)
    shape = found[0] if orientation < _FIRST_SIDEWAYS else found[0][::-1]
    if not _only_cut(shape, size):
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        decoded: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if decoded is None or orientation not in _TURNS:
        return decoded
    return np.asarray(_turned(Image.fromarray(decoded), orientation))


def fault_text(error: BaseException) -> str:
    """What one of DECODE_ERRORS says, on one line and the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow adds the address of the file in memory
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS} pixels"
    return " ".join(str(error).split()) or type(error).__name__


def picture_fault(data: bytes) -> str | None:
    """What Pillow says against a picture, on one line; None if it decodes to the last row."""
    try:
        decode_picture(data)
    except DECODE_ERRORS as error:
        return fault_text(error)
    return None


def shorter_side(data: bytes) -> int:
    """Of a picture without a fault, in pixels; only its header is read."""
    with Image.open(io.BytesIO(data)) as opened:
        return min(opened.size)


class Part(NamedTuple):
    """What is wanted of a resized picture, in its pixels."""

    top: int
    left: int
    size: Size


def resize(
    picture: Image.Image | UInt8[np.ndarray, "height width 3"], size: Size, part: Part | None = None
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """The largest centred part of a picture that has the shape of `size`, at that size, antialiased (bicubic).

    Args:
      picture: RGB, any size; of Pillow or as an array.
      size: of the result.
      part: what is wanted of it; None: all.

    Returns:
      values from 0 to 255.
    """
    if isinstance(picture, np.ndarray):
        height, width, _ = picture.shape
    else:
        width, height = picture.size
    y, x, (rows, columns) = part or Part(0, 0, size)
    if _only_cut((height, width), size):
        top, left = (height - size.height) // 2 + y, (width - size.width) // 2 + x
        if isinstance(picture, np.ndarray):
            return picture[top : top + rows, left : left + columns].copy()
        # Cut before it is copied out of Pillow, which for all of a picture takes half as long as decoding.
        return np.asarray(picture.crop((left, top, left + columns, top + rows)))
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    # Far too large pictures are first reduced by a whole factor (averaging), which costs no quality at 3.
    resized = picture.resize(
        (size.width, size.height),
        Image.Resampling.BICUBIC,
        box=_largest_box(height, width, size),
        reducing_gap=3.0,
    )
    return np.asarray(resized)[y : y + rows, x : x + columns]


def _only_cut(picture: tuple[int, int], size: Size) -> bool:
    """Whether a picture of that height and width has one side of `size`, and the other at least."""
    shrunk = [whole / wanted for whole, wanted in zip(picture, size)]
    return min(shrunk) == 1.0


def _largest_box(height: int, width: int, size: Size) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest centred part that has the shape of `size`."""
    if size.height == size.width:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2  # whole pixels
        return float(left), float(top), float(left + side), float(top + side)
    # Fractions of pixels, so that nothing is stretched.
    shrunk = min(height / size.height, width / size.width)
    tall, wide = size.height * shrunk, size.width * shrunk
    left_edge, upper_edge = (width - wide) / 2, (height - tall) / 2
    right_edge, lower_edge = min(float(width), left_edge + wide), min(float(height), upper_edge + tall)
    return left_edge, upper_edge, right_edge, lower_edge
