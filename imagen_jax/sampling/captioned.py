"""Grids of pictures with their captions below them."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from imagen_jax.sampling.pictures import grid

_SIDE = 128  # pixels; smaller pictures are enlarged as far as it, by a whole number
_TEXT_SIZE = 12  # pixels
_LINE = 15  # pixels from one line to the next
_LINES = 3  # of a caption; longer ones end in …
_MARGIN = 3  # pixels
# What systems have for Chinese; Pillow's font has Latin letters only.
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
)
_LATIN = 0x250  # code points below it


def captioned_grid(
    pictures: Sequence[np.ndarray], captions: Sequence[str], *, title: str = "", columns: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """A grid of pictures that are large enough to be seen, a caption below each.

    Args:
      pictures: uint8 (height, width, 3) each, of one size.
      captions: as many. One in letters for which no font is here becomes its number.
      title: above them all.
      columns: pictures a row; None: as square a grid as possible.

    Raises:
      ValueError: there are no pictures, or more or fewer captions.
    """
    cells = [
        _cell(picture, f"{number}  {caption}")
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start=1)
    ]
    made = grid(cells, columns=columns, gap=4)
    return np.concatenate([_strip(title, made.shape[1], 1), made]) if title else made


def enlarged(picture: UInt8[np.ndarray, "h w 3"], height: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The picture, every pixel repeated, as high as can be up to a height; at least as it is."""
    factor = max(1, height // picture.shape[0])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _cell(picture: np.ndarray, label: str) -> np.ndarray:
    picture = enlarged(picture, _SIDE)
    return np.concatenate([picture, _strip(label, picture.shape[1], _LINES)])


def _strip(text: str, width: int, lines: int) -> np.ndarray:
    """A text on white."""
    height = lines * _LINE + 2 * _MARGIN
    image = Image.new("RGB", (width, height), "white")
    font = _font(all(ord(letter) < _LATIN for letter in text))
    if font is None:
        text, font = text.partition(" ")[0], _font(True)
    assert font is not None
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(_wrapped(text, font, width - 2 * _MARGIN, lines)):
        draw.text((_MARGIN, _MARGIN + number * _LINE), line, fill="black", font=font)
    return np.asarray(image)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int
) -> Iterator[str]:
    """The lines of a text, broken at spaces where there are some; the last one ends in … if there is more."""
    for number in range(lines):
        if not text:
            return
        end = len(text)
        while end > 1 and font.getlength(text[:end]) > width:
            end -= 1
        if number == lines - 1 and end < len(text):
            yield text[: max(1, end - 1)] + "…"
            return
        if end < len(text) and (space := text.rfind(" ", 0, end + 1)) > 0:
            end = space
        yield text[:end]
        text = text[end:].lstrip()


@functools.cache
def _font(latin: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font; None: this system has none for more than Latin letters."""
    if latin:
        return ImageFont.load_default(_TEXT_SIZE)
    for name in _CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, _TEXT_SIZE)
        except OSError:
            pass
    return None
