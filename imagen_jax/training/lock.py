"""One run at a time in a work directory."""

from etils import epath

from imagen_jax.lock import FolderLock


class WorkdirLock(FolderLock):
    """Holds WORKDIR/lock (see `FolderLock`).

    Raises:
      UserError: another run holds it; names its host and process. Or the folder cannot be written.
    """

    def __init__(self, workdir: epath.PathLike):
        super().__init__(workdir, flag="--workdir")
