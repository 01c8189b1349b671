"""Which files are pictures, for all sources, and the one kind that needs a package of its own."""

import importlib.util

# Extensions, in lower case, of the kinds that Pillow decodes (HEIC with the package pillow-heif).
PICTURE_SUFFIXES = frozenset(
    ("apng", "avif", "bmp", "dds", "dib", "gif", "heic", "heif", "hif", "ico", "j2c", "j2k", "jfif", "jp2")
    + ("jpc", "jpe", "jpeg", "jpf", "jpg", "jpx", "mpo", "pbm", "pcx", "pfm", "pgm", "png", "pnm", "ppm")
    + ("psd", "qoi", "ras", "tga", "tif", "tiff", "webp", "xbm", "xpm")
)
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


def is_picture_name(name: str) -> bool:
    """Whether the last extension of a file's name is a picture's."""
    return name.rpartition(".")[2].lower() in PICTURE_SUFFIXES


def _have_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def register_heif() -> None:
    """Teaches Pillow to open HEIC and HEIF, if pillow-heif is installed."""
    if _have_heif():
        import pillow_heif

        pillow_heif.register_heif_opener()


def lacks_heif(data: bytes) -> bool:
    """Whether an encoded picture is HEIC or HEIF, and pillow-heif is not installed."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not _have_heif()
