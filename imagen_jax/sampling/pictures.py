"""Grids of pictures, and PNG files that say how they were made."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagen_jax.files import AtomicFile

METADATA_KEY = "imagen_jax"  # PNG text chunk with what is needed to make the picture again, as JSON


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
    """Writes a PNG, which appears when it is complete; `metadata` goes into a text chunk as JSON."""
    info = PngInfo()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG", pnginfo=info)
    with AtomicFile(path, tag="tmp") as file:
        file.write(encoded.getbuffer())


def read_metadata(path: epath.PathLike) -> dict[str, Any] | None:
    """What `save_png` was told of a picture, None for another PNG."""
    with epath.Path(path).open("rb") as file, Image.open(file) as image:
        text = image.info.get(METADATA_KEY)
    return None if text is None else json.loads(text)
