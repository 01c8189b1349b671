"""What the numbers of a decoded picture mean: from any of Pillow's modes to sRGB on white, as viewers show it."""

import functools
import io

import cv2
import numpy as np
from PIL import Image, ImageCms

_GREY_OF_16_BITS = frozenset({"PNG", "JPEG2000", "TIFF"})  # formats whose 16 bits run from black to white
_SAMPLE_FORMAT, _BITS_PER_SAMPLE, _PHOTOMETRIC = 339, 258, 262  # TIFF tags
_UNSIGNED, _WHITE_IS_ZERO = 1, 0  # values of the first and the last
_PNG_DEPTH = 24  # byte of a PNG that holds its bits a sample: in its first chunk, which has a fixed place
_SRGB = ImageCms.createProfile("sRGB")
_PROFILES = 32  # transforms kept; a data set has few profiles, and the largest take some megabytes


_OFTEN_ZERO = ("BMP", "DIB", "ICO", "TGA")  # formats whose fourth byte often means nothing


def rgb_on_white(picture: Image.Image, data: bytes) -> Image.Image:
    """A picture in sRGB without transparency.

    Args:
      picture: decoded, of any mode, with the `info` and `format` that it was opened with.
      data: what it was decoded from.

    Returns:
      mode RGB: an ICC profile converted to sRGB (one that is broken or meant for other modes is ignored, as
      viewers do), 16 bits scaled to 8, what is transparent laid over white. The picture itself where it is that.

    Raises:
      ValueError: the numbers' range is not known, so that nobody can say which of them is white.
    """
    _check_range(picture)
    opacity = _opacity(picture, data)
    colours = _colours(picture)
    if opacity is None:
        return colours
    shown = Image.new("RGB", picture.size, "white")
    shown.paste(colours, mask=opacity)
    return shown


def needs_conversion(picture: Image.Image) -> bool:
    """Whether the ICC profile of a picture says that its colours are not sRGB."""
    profile = picture.info.get("icc_profile")
    return bool(profile) and _to_srgb(profile, picture.mode) is not None


def _check_range(picture: Image.Image) -> None:
    """Refuses numbers of which nobody can say what is white."""
    mode = picture.mode
    bits = _tiff_tag(picture, _BITS_PER_SAMPLE, (1,))[0] if picture.format == "TIFF" else 32
    if bits < 32 and set(_tiff_tag(picture, _SAMPLE_FORMAT, (_UNSIGNED,))) != {_UNSIGNED}:
        raise ValueError(f"signed {bits}-bit samples of unknown range")
    # Pillow scales the portable grey maps of up to 16 bits itself, and says that they are of 32.
    if mode == "F" or (mode == "I" and picture.format != "PPM"):
        raise ValueError("32-bit grey of unknown range")
    if mode.startswith("I;16") and picture.format not in _GREY_OF_16_BITS:
        raise ValueError("16-bit grey of unknown range")


def _tiff_tag(picture: Image.Image, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = picture.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return value if isinstance(value, tuple) else (value,)


def _opacity(picture: Image.Image, data: bytes) -> Image.Image | None:
    """How much of each pixel is seen, mode L; None: all of all."""
    if picture.mode in ("RGBA", "LA", "PA"):
        opacity = picture.getchannel("A")
        # Programs that know no transparency leave zeros there, which viewers pass over.
        return None if picture.format in _OFTEN_ZERO and opacity.getextrema() == (0, 0) else opacity
    if picture.mode in ("RGBa", "La"):
        return picture.getchannel("a")
    if not picture.has_transparency_data:
        return None
    if picture.mode == "P":
        return picture.convert("RGBA").getchannel("A")
    colour = picture.info["transparency"]
    if isinstance(colour, tuple) and picture.format == "PNG" and data[_PNG_DEPTH] == 16:
        # Pillow keeps the upper 8 bits of 16, in which neighbours of the transparent colour look like it.
        return Image.fromarray(_png_opacity(data))
    if picture.mode == "RGB":
        return picture.convert("RGBA").getchannel("A")
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.where(np.asarray(picture) == colour, 0, 255).astype(np.uint8))
    if picture.format == "PNG" and picture.mode == "L":
        # Pillow stretches grey of 2 and 4 bits to 8, but not the transparent one; spare upper bits mean nothing.
        whole = 2 ** data[_PNG_DEPTH] - 1
        colour = (colour & whole) * 255 // whole
    return picture.convert("L").point([0 if value == colour else 255 for value in range(256)])


def _png_opacity(data: bytes) -> np.ndarray:
    """Opacity of a PNG of three times 16 bits with a transparent colour, by libpng; height × width."""
    decoded: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.ndim != 3 or decoded.shape[2] != 4:
        raise ValueError("transparent colour of 16 bits that cannot be read")
    return (decoded[..., 3] >> 8).astype(np.uint8)


def _colours(picture: Image.Image) -> Image.Image:
    """The colours as RGB, without regard to transparency."""
    mode, profile = picture.mode, picture.info.get("icc_profile")
    if mode.startswith("I"):
        picture = _eight_bits(picture)
    elif mode in ("1", "LA", "La"):
        # Colours that were multiplied by their opacity are divided by it.
        picture = (picture.convert("LA") if mode == "La" else picture).convert("L")
    elif mode not in ("L", "RGB", "CMYK"):
        picture = _without_alpha(picture)
    transform = _to_srgb(profile, picture.mode) if profile else None
    if transform is not None:
        return transform.apply(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _without_alpha(picture: Image.Image) -> Image.Image:
    """RGB of the modes that have a palette or an opacity, and of YCbCr and LAB."""
    if picture.mode in ("P", "PA", "RGBa"):
        picture = picture.convert("RGBA")
    # A transparent colour was for `_opacity`.
    picture.info.pop("transparency", None)
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 9 to 16 bits, scaled to 8; Pillow itself would clip it at 255."""
    white, grey = 65535.0, np.asarray(picture, np.float32)
    if picture.format == "TIFF":
        white = 2.0 ** _tiff_tag(picture, _BITS_PER_SAMPLE, (16,))[0] - 1
        if _tiff_tag(picture, _PHOTOMETRIC, (1,))[0] == _WHITE_IS_ZERO:
            grey = white - grey  # Pillow turns round those of up to 8 bits only
    return Image.fromarray(np.clip(np.round(grey * (255 / white)), 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=_PROFILES)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from an ICC profile to sRGB; None: what the profile says is to be left alone.

    That is so for one which is sRGB, whatever its name, and for one which is damaged or meant for other modes.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(opened, _SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        probe = Image.fromarray(colours if mode == "RGB" else levels[None])
        change = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform if np.abs(change).max() > 1 else None
