"""Sizes of pictures, whose two sides need not be equal."""

import re
from typing import NamedTuple

from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_SIDE, shown


class Size(NamedTuple):
    """In pixels; written width × height, as everywhere outside of arrays."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"

    def scaled(self, numerator: int, denominator: int) -> "Size | None":
        """Both sides times a fraction; None where one of them is no whole number then."""
        if any(side * numerator % denominator for side in self):
            return None
        return Size(*(side * numerator // denominator for side in self))

    def over(self, divisor: int) -> "Size":
        """Both sides divided.

        Raises:
          ValueError: one of them is no multiple.
        """
        size = self.scaled(1, divisor)
        if size is None:
            raise ValueError(f"{self} is no multiple of {divisor} pixels")
        return size


def parse_size(text: str, flag: str) -> Size:
    """A size as "96x64", width first.

    Raises:
      UserError: it is none; names the flag.
    """
    match = re.fullmatch(r"(\d{1,9})[x×](\d{1,9})", text.strip(), re.ASCII)
    if match is None:
        raise UserError(f"{flag} {shown(text)}: give WIDTHxHEIGHT in pixels, such as 96x64")
    width, height = map(int, match.groups())
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise UserError(f"{flag} {text}: both sides must be from 1 to {MAX_SIDE} pixels")
    return Size(height, width)
