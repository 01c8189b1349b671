"""What every source of captioned pictures offers: examples by unit, damaged ones named instead of raised."""

import abc
import dataclasses
import errno
import itertools
import lzma
import os
import re
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import check_regular

PICTURE_BYTES = 2**30  # of one encoded picture: a record holds less than 2 GiB
CAPTION_BYTES = 2**24  # of one file of captions

# Everything that readers of files and formats let out on damaged or hostile input.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,  # RecursionError, NotImplementedError
    SyntaxError,
    MemoryError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
)
# Faults of the machine or the network, not of the file: a later run meets others or none.
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH}
    | {errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT}
)
_ADDRESS = re.compile(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>|\s+at 0x[0-9a-fA-F]+")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UnusableError(ValueError):
    """A sample that cannot be used; `attempt` makes a `Skipped` of it."""

    def __init__(self, reason: str, detail: str = ""):
        """Takes what `Skipped` will say."""
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Bytes of a file's name that are not UTF-8 come from the system as U+DC80 to U+DCFF.
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{byte:02x}" if byte < 0x100 else f"\\u{code:04x}"


def printable(text: str) -> str:
    """The text with what no file can hold or no line should (lone surrogates, control characters) escaped."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A captioned picture as it lies in the source."""

    file: str  # where it comes from, for messages
    key: str  # unique within the source
    image: bytes  # encoded, not yet checked
    captions: tuple[str, ...]  # at least one, none of them empty

    def __post_init__(self):
        """Names become printable: those of files and members may be in any encoding."""
        for name in ("file", "key"):
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that cannot be used."""

    file: str  # of the source
    key: str  # of the sample; empty if the file as a whole is meant
    reason: str  # the kind of fault in a few words, the same for all samples that share it
    detail: str = ""  # what is particular to this one

    def __post_init__(self):
        """Texts become printable, on one line and the same in every run: without addresses in memory."""
        object.__setattr__(self, "detail", " ".join(_ADDRESS.sub("", self.detail).split()))
        for name in ("file", "key", "reason", "detail"):
            object.__setattr__(self, name, printable(getattr(self, name)))


class Source(abc.ABC):
    """Captioned pictures, divided into units that are read independently of each other.

    What a unit holds depends on the source and the number of units only, so that each can be read again,
    by any process, with the same result.
    """

    @abc.abstractmethod
    def units(self, count: int | None = None) -> Sequence[Any]:
        """Divides the source into `count` units, in order; None: a count that suits its size."""

    @abc.abstractmethod
    def read(self, unit: Any) -> Iterator[Example | Skipped]:
        """The samples of one unit, in the order of the source: every one either as Example or as Skipped."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the source's files do."""

    @property
    @abc.abstractmethod
    def size(self) -> int | None:
        """Number of samples that all units yield together, where it is known without reading everything."""


def fault_of(error: BaseException, file: str) -> str:
    """What is wrong with a file that cannot be read, on one line.

    Raises:
      UserError: the fault is not the file's but the machine's or the network's, so that leaving the sample
        out would make two runs differ.
    """
    cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    if isinstance(cause, ConnectionError | TimeoutError) or getattr(cause, "errno", None) in _PASSING:
        advice = "run the same command again (what is complete is kept)"
        raise UserError(f"--source: {printable(file)}: {one_line(cause)}; {advice}") from error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the file says
    return one_line(error)


def attempt(read: Callable[[], Example], *, file: str, key: str) -> Example | Skipped:
    """Reads one sample; whatever is wrong with it makes it a listed skip, never an end of the job.

    Args:
      read: gives the example; raises `UnusableError`, or whatever its readers let out.
      file: of the source, for the skip.
      key: of the sample, for the skip.

    Raises:
      UserError: the machine or the network fails (`fault_of`).
    """
    try:
        return read()
    except UnusableError as fault:
        return Skipped(file=file, key=key, reason=fault.reason, detail=fault.detail)
    except READ_ERRORS as error:
        return Skipped(file=file, key=key, reason="cannot be read", detail=fault_of(error, file))


def read_file(path: epath.Path, limit: int) -> bytes:
    """Reads a file of a sample.

    Args:
      path: local or cloud file.
      limit: bytes that it may have.

    Raises:
      UnusableError: it is larger.
      UserError: a pipe or a device.
      OSError: it is missing or the system refuses.
    """
    check_regular(path)
    local = "://" not in os.fspath(path)
    size = os.stat(path).st_size if local else None
    data = path.read_bytes() if size is None or size <= limit else b""
    if (size or len(data)) > limit:
        raise UnusableError("too large", f"{size or len(data)} bytes, where at most {limit} are read")
    return data


def is_lfs_pointer(data: bytes) -> bool:
    """Whether this is what Git leaves in place of a large file that was not fetched."""
    return data.startswith(_LFS_POINTER)


def decode_caption(data: bytes) -> str:
    """Text of UTF-8 bytes, without a byte order mark.

    Raises:
      UnusableError: it is not UTF-8, or a Git LFS pointer stands in its place.
    """
    if is_lfs_pointer(data):
        raise UnusableError("Git LFS pointer in place of a caption", "git lfs pull fetches the files")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UnusableError("caption is not UTF-8", str(error)) from error


def caption_lines(data: bytes) -> list[str]:
    """The captions of a .txt, one a line; only newlines divide.

    Raises:
      UnusableError: as `decode_caption`.
    """
    return decode_caption(data).split("\n")


def _shows(text: str) -> bool:
    """Whether there is anything to see of a text: more than white space and signs of no width."""
    return any(not sign.isspace() and unicodedata.category(sign) not in ("Cc", "Cf") for sign in text)


def clean_captions(captions: Sequence[Any]) -> tuple[str, ...]:
    """The captions that are text and show something, without white space around them.

    Raises:
      UnusableError: one has half a character (a lone surrogate), which no file can hold.
    """
    cleaned = tuple(caption.strip() for caption in captions if isinstance(caption, str) and _shows(caption))
    for caption in cleaned:
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableError(
                "caption with half a character", f"a lone surrogate at {error.start}"
            ) from error
    return cleaned


def even_ranges(size: int, count: int) -> list[range]:
    """Divides `range(size)` into `count` consecutive ranges whose lengths differ by one at most."""
    bounds = [size * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
