"""One run at a time in a work directory."""

import fcntl
import os
import socket

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import is_cloud, make_folder


class WorkdirLock:
    """Holds WORKDIR/lock from its construction until `close`, or until the process ends in any way.

    The kernel keeps the lock, so that a killed run leaves none behind. Object stores (gs://…) have no such thing:
    there two runs of one work directory are not noticed, and `held` is false.

    Raises:
      UserError: another run holds it; names its host and process. Or the folder cannot be written.
    """

    def __init__(self, workdir: epath.PathLike):
        self._file = None
        folder = make_folder(workdir)
        if is_cloud(folder):
            return
        path = os.path.join(os.fspath(folder), "lock")
        try:
            file = open(path, "a+")  # noqa: SIM115 - stays open as long as the run
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; --workdir must be a folder that can be written"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"--workdir {folder}: another run is going on in it ({holder}); stop that one first or take "
                "another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        self._file = file

    @property
    def held(self) -> bool:
        """Whether the work directory is guarded."""
        return self._file is not None

    def close(self) -> None:
        """Lets go."""
        if self._file is not None:
            self._file.close()
            self._file = None
