"""What sampling remembers from one run to the next: compiled programs, below the user's cache folder.

FOLDER/programs holds the text encoder's and the stages' programs as the compiler made them (`executables`). FOLDER/xla
is JAX's persistent compilation cache, for all other programs. What was used longest ago is removed from both beyond a
certain size: every setting, length of prompt, version and machine that shares the folder has programs of its own.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache
from jaxlib import xla_client

import imagen_jax
from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, read_bytes

VARIABLE = "IMAGEN_JAX_CACHE"
OFF = "off"
# What programs are made from, and what reads and writes them.
_SOURCES = ("diffusion/*", "models/*", "parallel/*", "sampling/*", "text/*", "cache", "executables")
# What the compiler heeds beside a program: environment variables, and settings of JAX.
_COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
MAX_PROGRAMS = 128  # files in FOLDER/programs
MAX_BYTES = 4 * 2**30  # in either folder
_one_compiles = threading.Lock()


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
    # JAX's own limit would have it lock the folder at every program.
    remove_oldest(folder / "xla", most_bytes=MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    # A stage's start-up also has many small programs; together they take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Has JAX compile anew.

    An executable that JAX took from its cache cannot be serialised again: on CPU its functions would be missing.
    """
    with _one_compiles:
        enabled = _setting("jax_enable_compilation_cache")
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX decides once whether it uses the cache
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", enabled)
            compilation_cache.reset_cache()


@functools.cache
def _code_hash() -> str:
    """Of the source files that programs are made from: a changed network is never served an old program."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(root.glob(f"{pattern}.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _processor() -> str:
    """Instructions that this machine's processor has: a program made for others may not run on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    return f"{platform.machine()} {flags or platform.processor()}"  # the latter starts a process: slow


def _topology(devices: tuple[jax.Device, ...]) -> int | None:
    """What tells apart machines whose devices have the same numbers; None where JAX does not know."""
    try:
        return xla_client.get_topology_for_devices(devices).fingerprint()
    except (AttributeError, TypeError, RuntimeError):
        return None


def program_key(description: Any, devices: Sequence[jax.Device]) -> str:
    """Name of a program.

    Args:
      description: of the program, in JSON types.
      devices: that it runs on.
    """
    first = devices[0]
    whole = {
        "program": description,
        "code": [imagen_jax.__version__, _code_hash()],
        "jax": [jax.__version__, jaxlib.__version__],
        "platform": [first.platform, first.client.platform_version, _topology(tuple(devices))],
        "device": [first.device_kind, *(device.id for device in devices)],
        "processor": _processor(),
        "compiler": [os.environ.get(name) for name in _COMPILER_VARIABLES],
        "settings": [str(jax.config.values.get(name)) for name in _SETTINGS],
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def remove_oldest(folder: Path, *, most_bytes: int, most_files: int | None = None) -> None:
    """Removes the files of a folder that were used longest ago.

    Args:
      folder: that may be missing; folders in it stay.
      most_bytes: that stay.
      most_files: that stay; None: any number.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has removed it
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    found.append((max(stat.st_mtime_ns, stat.st_atime_ns), stat.st_size, entry.path))
    files, total = 0, 0
    for _, size, path in sorted(found, reverse=True):
        if total + size <= most_bytes and (most_files is None or files < most_files):
            files, total = files + 1, total + size
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


def load_program(folder: Path, key: str) -> bytes | None:
    """A program's bytes; None if there is none that can be read whole."""
    path = folder / "programs" / key
    try:
        content = read_bytes(path)
    except UserError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used
    digest, program = content[:32], content[32:]
    return program if _program_digest(key, program) == digest else None


def save_program(folder: Path, key: str, program: bytes) -> None:
    """Remembers a program's bytes with their checksum; programs that were used longest ago make room."""
    with AtomicFile(folder / "programs" / key, tag=str(os.getpid())) as file:
        file.write(_program_digest(key, program) + program)
    remove_oldest(folder / "programs", most_bytes=MAX_BYTES, most_files=MAX_PROGRAMS)


def _program_digest(key: str, program: bytes) -> bytes:
    """Of a program under its key: under another one, where a file was renamed or copied, it is not found."""
    return hashlib.sha256(key.encode() + program).digest()
