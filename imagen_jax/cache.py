"""What sampling remembers from one run to the next: programs in JAX's compilation cache, in the user's cache folder.

What was used longest ago is removed beyond a certain size: every setting, length of prompt, version and machine that
shares the folder has programs of its own.
"""

import contextlib
import os
from pathlib import Path

import jax

from imagen_jax.errors import UserError

VARIABLE = "IMAGEN_JAX_CACHE"
OFF = "off"
MAX_BYTES = 4 * 2**30


def cache_folder(choice: str | None = None) -> Path | None:
    """The folder of the cache; None: nothing is remembered.

    Args:
      choice: a folder or "off"; None: $IMAGEN_JAX_CACHE, else imagen_jax below $XDG_CACHE_HOME or ~/.cache.

    Raises:
      UserError: if a folder that was asked for cannot be made.
    """
    asked = choice or os.environ.get(VARIABLE)
    if asked == OFF:
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(asked) if asked else Path(base) / "imagen_jax"
    try:
        folder = folder.expanduser()
        (folder / "xla").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # no home, read-only, no space
        if asked:
            raise UserError(f"cache folder {folder}: {error}; give another, or {OFF!r}") from error
        return None
    return folder if os.access(folder / "xla", os.W_OK) else None


def enable_compilation_cache(folder: Path | None) -> None:
    """Lets JAX keep compiled programs in FOLDER/xla, unless it was told of another place already."""
    if folder is None or jax.config.values["jax_compilation_cache_dir"]:
        return
    trim(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    # A stage's start-up also has many small programs; together they take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def trim(folder: Path | None) -> None:
    """Makes room where more than MAX_BYTES are kept. JAX's own limit would have it lock the folder at every program."""
    if folder is not None:
        remove_oldest(folder / "xla", most_bytes=MAX_BYTES)


def remove_oldest(folder: Path, *, most_bytes: int) -> None:
    """Removes the files of a folder that were used longest ago.

    Args:
      folder: that may be missing; folders in it stay.
      most_bytes: that stay.
    """
    files = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has removed it
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    files.append((max(stat.st_mtime_ns, stat.st_atime_ns), stat.st_size, entry.path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        if total + size <= most_bytes:
            total += size
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)
