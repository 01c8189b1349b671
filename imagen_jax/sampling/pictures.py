"""Grids of pictures, and PNG files that say how they were made."""

import io
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, check_regular, json_object, parse_json

METADATA_KEY = "imagen_jax"  # PNG text chunk with what is needed to make the picture again, as JSON
MAX_PIXELS = 2**26  # of a picture that is taken for one of this program
# How the chunk begins that `save_png` writes after the signature, IHDR and this chunk's length: its name, the key, and
# that its text, an object, is neither compressed nor of some language.
_TEXT_CHUNK = b"iTXt" + METADATA_KEY.encode() + bytes(5) + b"{"
_TEXT_OFFSET = 8 + 25 + 4


class DamagedPictureError(UserError):
    """A file that is no PNG, ends early, or whose checksums do not fit."""


def grid(
    pictures: Sequence[np.ndarray], *, columns: int | None = None, gap: int = 2
) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures of one size in rows on white, `gap` pixels apart.

    Args:
      pictures: uint8 (side, side, 3) each.
      columns: pictures a row; None: as square a grid as possible.
      gap: pixels.

    Raises:
      ValueError: if there are no pictures.
    """
    if not len(pictures):
        raise ValueError("a grid needs at least one picture, got none")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width, _ = pictures[0].shape
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def save_png(
    path: epath.PathLike, picture: UInt8[np.ndarray, "h w 3"], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG by renaming a complete file; `metadata` goes into a text chunk as JSON.

    Raises:
      UserError: the disk is full or the system refuses otherwise; names the file.
    """
    info = PngInfo()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    with AtomicFile(path, tag=str(os.getpid())) as file:
        file.write(buffer.getvalue())


def read_metadata(path: epath.PathLike, *, whole: bool = False) -> dict[str, Any] | None:
    """What `save_png` was told of a picture, None for another PNG. No pixel is decoded.

    Args:
      path: of anybody's file.
      whole: whether the rest of the file is read, too, and its checksums compared.

    Raises:
      DamagedPictureError: it is no PNG that can be read.
      UserError: it has too many pixels, or its metadata are no JSON object. Both name the file.
    """
    path = epath.Path(path)
    try:
        check_regular(path)
        # Not `Image.open`, which refuses or warns of large pictures.
        with path.open("rb") as file, PngImageFile(file) as image:
            text, (width, height) = image.info.get(METADATA_KEY), image.size
            if whole:
                image.verify()
    except UserError as error:
        raise DamagedPictureError(str(error)) from None
    # All that Pillow raises for broken files. A SyntaxError's text is "not a PNG file" and the like.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DamagedPictureError(f"{path} is not a readable picture: {reason}") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width}×{height} pixels, where at most {MAX_PIXELS} are read")
    return (
        None if text is None else json_object(parse_json(text, f"{path}: its record"), f"{path}: its record")
    )


def begins_as_ours(path: epath.Path) -> bool:
    """Whether a file begins as `save_png` begins one with metadata, wherever it then ends."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(_TEXT_OFFSET + len(_TEXT_CHUNK))
    except (OSError, UserError):
        return False
    return head[_TEXT_OFFSET:] == _TEXT_CHUNK
