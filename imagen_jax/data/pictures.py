"""Encoded pictures to square uint8 arrays: decoding, antialiased resizing, checking."""

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

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


def picture_fault(data: bytes) -> str | None:
    """What Pillow says against a picture, on one line; None if it decodes to the last row."""
    try:
        decode_picture(data)
    except DECODE_ERRORS as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def resize_square(picture: Image.Image, resolution: int) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """The largest centred square of a picture at another resolution, antialiased (bicubic).

    Args:
      picture: RGB, any size.
      resolution: side of the result in pixels.

    Returns:
      values from 0 to 255.
    """
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if side == resolution:
        return np.asarray(picture.crop(box))
    # Far too large pictures are first reduced by a whole factor (averaging), which costs no quality at 3.
    resized = picture.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(resized)
