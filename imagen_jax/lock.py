"""One run at a time in a folder."""

import contextlib
import errno
import fcntl
import os
import socket
from types import TracebackType
from typing import Any

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import is_cloud, make_folder

# What file systems answer that cannot lock.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class FolderLock:
    """Holds FOLDER/NAME from its construction until `close`, or until the process ends in any way.

    The kernel keeps the lock, so that a killed run leaves none behind. Object stores (gs://…) and some network
    file systems have no such thing: there two runs are not noticed, and `held` is false.

    Args:
      folder: of the run; created if it is not there.
      flag: that named it, for messages.
      name: of the file in the folder.
      what: the run is called.
      remove: whether `close` removes the file; one whose holder was killed stays (see `remove_unheld`).

    Raises:
      UserError: another run holds it; names its host and process. Or the folder cannot be written.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        flag: str,
        name: str = "lock",
        what: str = "run",
        remove: bool = False,
    ):
        self._file: Any = None
        self._remove = remove
        folder = make_folder(folder)
        if is_cloud(folder):
            return
        self._path = os.path.join(os.fspath(folder), name)
        while True:
            try:
                file = open(self._path, "a+")  # noqa: SIM115 - stays open as long as the run
            except OSError as error:
                raise UserError(
                    f"{self._path}: {error.strerror}; {flag} must be a folder that can be written"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise UserError(
                    f"{flag} {folder}: another {what} is going on in it ({holder}); stop that one first or take "
                    f"another {flag}"
                ) from None
            except OSError as error:
                file.close()
                if error.errno in _NO_LOCKS:
                    return
                raise
            if _is_at(file, self._path):
                break
            file.close()  # its holder has removed it in the meantime
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        self._file = file

    @property
    def held(self) -> bool:
        """Whether the folder is guarded."""
        return self._file is not None

    def close(self) -> None:
        """Lets go."""
        if self._file is not None:
            if self._remove:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)  # before it is let go: afterwards it may be another's
            self._file.close()
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_at(file: Any, path: str) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def remove_unheld(path: epath.PathLike) -> None:
    """Removes the file of a lock whose holder was killed; one that is held stays."""
    with contextlib.suppress(OSError), open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, os.fspath(path)):
            os.unlink(path)
