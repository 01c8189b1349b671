"""Pictures that a drawing begins with, and what of them is to be painted."""

import dataclasses
import functools
import hashlib
import io

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps

from imagen_jax.data.pictures import DECODE_ERRORS, decode_picture, fault_text, resize
from imagen_jax.errors import UserError
from imagen_jax.files import read_given
from imagen_jax.sampling.inputs import to_unit
from imagen_jax.sizes import Size

_MOST_BYTES = 2**30  # of a picture's file
_HALF = 128  # grey level from which a mask is white


def _decoded(path: epath.PathLike, flag: str) -> tuple[UInt8[np.ndarray, "height width 3"], bytes]:
    """A file's picture, and the file."""
    data = read_given(path, flag, limit=_MOST_BYTES)
    try:
        return np.asarray(decode_picture(data).convert("RGB")), data
    except DECODE_ERRORS as error:
        raise UserError(f"{flag} {path} is no picture that can be read: {fault_text(error)}") from error


def read_picture(path: epath.PathLike, flag: str) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes a user's picture to sRGB, turned as its EXIF says, on white where it is transparent.

    Args:
      path: of the file, local or in the cloud.
      flag: that named it, for messages.

    Raises:
      UserError: there is no such file, or it is no picture that can be read; names the flag and the file.
    """
    return _decoded(path, flag)[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GivenPicture:
    """A picture, and which part of it is to be painted.

    Raises:
      UserError: the mask has another size, or nothing of the picture, or all of it, is to be painted.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "mask_height mask_width"] | None = (
        None  # True: to be painted; None: there is no mask
    )

    def __post_init__(self) -> None:
        if self.mask is None:
            return
        size = Size(*self.pixels.shape[:2])
        if self.mask.shape != tuple(size):
            raise UserError(
                f"--mask is of {Size(*self.mask.shape)} pixels and the picture of {size}: both must have one size"
            )
        if not self.mask.any():
            raise UserError("--mask is black everywhere: what is to be painted is white")
        if self.mask.all():
            raise UserError("--mask is white everywhere: nothing would be kept; leave it out to redraw all")

    @property
    def size(self) -> Size:
        """In pixels."""
        return Size(*self.pixels.shape[:2])

    @property
    def usual_strength(self) -> float:
        """Where nothing else is asked for: noise alone where a mask says what is kept."""
        return 0.6 if self.mask is None else 1.0

    def fitted(self, size: Size) -> "GivenPicture":
        """The picture at another size, a little stretched where that has another shape, so that nothing is cut."""
        if size == self.size:
            return self
        image = Image.fromarray(self.pixels).resize((size.width, size.height), Image.Resampling.BICUBIC)
        mask = None if self.mask is None else self.mask_at(size)[..., 0] > 0.0
        return GivenPicture(pixels=np.asarray(image), mask=mask)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the decoded pixels, size and mask included: what other files of the same picture share."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        if self.mask is not None:
            digest.update(np.packbits(self.mask).tobytes())
        return digest.hexdigest()

    def at(self, size: Size) -> Float[np.ndarray, "height2 width2 3"]:
        """The picture at another size, in [−1, 1], as training sees pictures of that size."""
        return to_unit(self.pixels if size == self.size else resize(self.pixels, size))

    def mask_at(self, size: Size) -> Float[np.ndarray, "height2 width2 1"]:
        """The mask at another size, 1: to be painted. A pixel with any part of that in it is painted."""
        if self.mask is None:
            raise ValueError("there is no mask")
        mask = self.mask.astype(np.float32)
        if size != self.size:
            image = Image.fromarray(mask).resize((size.width, size.height), Image.Resampling.BOX)
            mask = (np.asarray(image) > 1e-3).astype(np.float32)
        return mask[..., None]


def read_mask(path: epath.PathLike, flag: str = "--mask") -> Bool[np.ndarray, "height width"]:
    """A mask from a user's file: white is to be painted, by brightness; what is transparent is kept.

    Raises:
      UserError: as `read_picture`.
    """
    pixels, data = _decoded(path, flag)
    white = pixels.astype(np.int32).sum(axis=-1) >= 3 * _HALF
    with Image.open(io.BytesIO(data)) as image:
        if not image.has_transparency_data:
            return white
        opaque = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    return white & (np.asarray(opaque) >= _HALF)


def enlarged(
    pixels: UInt8[np.ndarray, "height width 3"], left: int, top: int, right: int, bottom: int
) -> GivenPicture:
    """A picture on a larger canvas, whose margins are to be painted.

    Args:
      pixels: of the picture.
      left: pixels of the margin there; and so on.
      top: above.
      right: to the right.
      bottom: below.

    Raises:
      UserError: a margin is negative, or all are 0.
    """
    margins = (left, top, right, bottom)
    if min(margins) < 0 or not any(margins):
        raise UserError(
            f"--outpaint {','.join(map(str, margins))}: margins must be 0 or more pixels, one of them more"
        )
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(pixels.shape[:2], bool), around, constant_values=True)
    # What lies there is only seen where a part of the way is left out: the edge goes on.
    return GivenPicture(pixels=np.pad(pixels, (*around, (0, 0)), mode="edge"), mask=mask)
