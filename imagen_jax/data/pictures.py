"""Encoded pictures to square uint8 arrays: decoding, antialiased resizing, checking."""

import io
import struct
import zlib

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from imagen_jax.data.picture_kinds import register_heif

register_heif()

# Everything that Pillow's decoders let out on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# A picture that will be shrunk is decoded with at least so many pixels per pixel of the result, along one side:
# what Pillow's own thumbnails keep.
_DRAFT = 2


def decode_picture(data: bytes, smallest: int | None = None) -> Image.Image:
    """Decodes a whole picture to RGB; transparency is laid over white, EXIF rotation applied.

    Args:
      data: an encoded picture.
      smallest: side in pixels of the largest picture that will be made of it: a JPEG is then decoded at a
        half, a quarter or an eighth of its size where that leaves both sides twice as long, which saves most
        of the time and moves the centre by a quarter of a pixel of the result at most; None: at its own size.

    Raises:
      one of DECODE_ERRORS: the picture is damaged, cut off or of an unknown format.
    """
    with Image.open(io.BytesIO(data)) as opened:
        if smallest is not None:
            # Averages over blocks in the frequency domain; formats other than JPEG do not heed it.
            opened.draft(None, (_DRAFT * smallest, _DRAFT * smallest))
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)  # else it copies what it need not turn
        picture: Image.Image = opened
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow clips 16-bit grey values at 255 instead of scaling them.
        grey = np.clip(np.asarray(picture, np.float32) / 257.0, 0, 255)
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


# Start of frame: 8 bits a sample, height, width, three components; of any kind that Pillow reads too.
_FRAME = struct.Struct(">BHHB")
_FRAME_MARKERS = frozenset({0xC0, 0xC1, 0xC2})


def _colour_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of three 8-bit components, as stored; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        if marker in _FRAME_MARKERS and start + 4 + _FRAME.size <= len(data):
            bits, height, width, components = _FRAME.unpack_from(data, start + 4)
            return (height, width) if (bits, components) == (8, 3) else None
        start += 2 + length
    return None


def decode_exact(data: bytes, side: int) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decodes a colour JPEG whose shorter side is what is wanted, with OpenCV: the pixels that Pillow gives.

    Such a picture is only cut, never resized, and decoding it is most of an input pipeline's work. Pillow needs
    half as long again, and longer still to hand the pixels over.

    Args:
      data: an encoded picture.
      side: shorter side, in pixels, that it has to have.

    Returns:
      values from 0 to 255, EXIF rotation applied; None for any other picture and for one that OpenCV refuses,
      about which Pillow has more to say.
    """
    size = _colour_jpeg_size(data)
    if size is None or min(size) != side:
        return None
    decoded: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return decoded


def picture_fault(data: bytes) -> str | None:
    """What Pillow says against a picture, on one line; None if it decodes to the last row."""
    try:
        decode_picture(data)
    except DECODE_ERRORS as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def resize_square(
    picture: Image.Image | UInt8[np.ndarray, "height width 3"],
    resolution: int,
    part: tuple[int, int, int] | None = None,
) -> UInt8[np.ndarray, "side side 3"]:
    """The largest centred square of a picture at another resolution, antialiased (bicubic).

    Args:
      picture: RGB, any size; of Pillow or as an array.
      resolution: side of the square in pixels.
      part: (top, left, size) in pixels of the resized square, what is wanted of it; None: all.

    Returns:
      values from 0 to 255.
    """
    if isinstance(picture, np.ndarray):
        height, width, _ = picture.shape
    else:
        width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    y, x, size = part or (0, 0, resolution)
    if side == resolution:
        if isinstance(picture, np.ndarray):
            return picture[top + y : top + y + size, left + x : left + x + size].copy()
        # Cut before it is copied out of Pillow, which for all of a picture takes half as long as decoding.
        return np.asarray(picture.crop((left + x, top + y, left + x + size, top + y + size)))
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    box = (left, top, left + side, top + side)
    # Far too large pictures are first reduced by a whole factor (averaging), which costs no quality at 3.
    resized = picture.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(resized)[y : y + size, x : x + size]
