"""What sampling remembers from one run to the next: compiled programs, below the user's cache folder.

FOLDER/xla is JAX's persistent compilation cache. FOLDER/programs holds each stage's program as JAX hands it to the
compiler (`jax.export`), so that a network need not be traced again to find the compiled one.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

import imagen_jax
from imagen_jax.data.files import AtomicFile
from imagen_jax.errors import UserError

VARIABLE = "IMAGEN_JAX_CACHE"
OFF = "off"
# What a stage's program is made from.
_SOURCES = ("diffusion", "models", "parallel", "sampling")


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
        (folder / "programs").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # no home, read-only, no space
        if asked:
            raise UserError(f"cache folder {folder}: {error}; give another, or {OFF!r}") from error
        return None
    return folder if os.access(folder / "programs", os.W_OK) else None


def _setting(name: str) -> Any:
    return jax.config.values[name]


def enable_compilation_cache(folder: Path | None) -> None:
    """Lets JAX keep compiled programs in FOLDER/xla, unless it was told of another place already."""
    if folder is None or _setting("jax_compilation_cache_dir"):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    # A stage's start-up also has many small programs; together they take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def _code_hash() -> str:
    """Of the source files that programs are made from: a changed network is never served an old program."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def program_key(description: Any) -> str:
    """Name of a program that is described by JSON types, on this machine's devices and with this code."""
    devices = jax.devices()
    whole = {
        "program": description,
        "code": [imagen_jax.__version__, _code_hash()],
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "matmul": str(_setting("jax_default_matmul_precision")),
        "random": [_setting("jax_default_prng_impl"), _setting("jax_threefry_partitionable")],
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def load_program(folder: Path | None, key: str) -> bytes | None:
    """A program's bytes; None if there is none, or it is damaged."""
    if folder is None or not (path := folder / "programs" / key).exists():
        return None
    content = path.read_bytes()
    digest, program = content[:32], content[32:]
    return program if hashlib.sha256(program).digest() == digest else None


def save_program(folder: Path | None, key: str, program: bytes) -> None:
    """Remembers a program's bytes with their checksum."""
    if folder is not None:
        with AtomicFile(folder / "programs" / key, tag=str(os.getpid())) as file:
            file.write(hashlib.sha256(program).digest() + program)
