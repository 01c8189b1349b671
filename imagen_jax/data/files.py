"""Writing files so that a name either holds the whole file or does not exist."""

import contextlib
import errno
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from etils import epath

from imagen_jax.errors import UserError

# What the system answers when there is no room: the disk, the user's quota, the process's limit.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def _naming_file(path: epath.Path) -> Iterator[None]:
    """Turns what the system refuses ("no space left on device", …) into one line that names the file."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        advice = "; make room and run the same command again (what is complete is kept)"
        fault = os.strerror(number) if number else str(error)
        raise UserError(f"{path}: {fault}{advice if number in _NO_ROOM else ''}") from error


def make_folder(path: epath.PathLike) -> epath.Path:
    """Creates a folder with its parents, if it is not there.

    Raises:
      UserError: the system refuses; names the folder.
    """
    path = epath.Path(path).expanduser()
    with _naming_file(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


class AtomicFile:
    """A file under a temporary name (`incomplete.NAME`) that takes its own name when it is complete.

    With a `tag` the temporary name is `incomplete.NAME.TAG`, for files that several processes may write at once.
    As a context manager it commits at the end of the block and discards on any exception.

    Raises:
      UserError: the disk is full or the system refuses otherwise, on opening, on any write, on closing and
        on renaming; names the file. Nothing is left behind.
    """

    def __init__(self, path: epath.PathLike, *, tag: str = ""):
        """Opens the temporary file; an older one of the same name is overwritten."""
        self.path = epath.Path(path)
        self._temporary = self.path.parent / f"incomplete.{self.path.name}{'.' * bool(tag)}{tag}"
        with _naming_file(self.path):
            self._file: Any = self._temporary.open("wb")

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        with _naming_file(self.path):
            self._file.write(data)

    def commit(self) -> None:
        """Closes the file and gives it its name; until then readers see nothing of it."""
        with _naming_file(self.path):
            self._file.flush()
            # Without it a power cut can leave a complete name on an empty file.
            with contextlib.suppress(AttributeError, NotImplementedError):
                _sync(self._file)
            self._file.close()
            self._temporary.replace(self.path)

    def discard(self) -> None:
        """Closes and removes the temporary file."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.commit()
        except BaseException:
            self.discard()
            raise


def _sync(file: Any) -> None:
    """`fsync` where the file is local (cloud files have no descriptor)."""
    try:
        descriptor = file.fileno()
    except OSError:  # io.UnsupportedOperation
        return
    os.fsync(descriptor)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a UTF-8 text file atomically.

    Raises:
      UserError: the disk is full.
    """
    with AtomicFile(path) as file:
        file.write(text.encode("utf-8"))
