"""Files: written so that a name either holds the whole file or does not exist; read with the file named at a fault."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.limits import shown

# What the system answers when there is no room: the disk, the user's quota, the process's limit.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What `git clone` leaves in the place of a large file where Git LFS is not installed.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


# Of cloud paths: scheme → the package that reads and writes them, and the extra of this package that brings it.
_CLOUD = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# What object stores and their sign-in raise, where it is no OSError.
_CLOUD_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"})
_PART = 16 * 2**20  # bytes handed to an object store, or copied, at a time


def is_cloud(path: epath.PathLike) -> bool:
    """Whether a path is in an object store (`gs://…`, `s3://…`).

    There a file appears whole or not at all, and can be neither appended to, mapped nor locked; a folder is there
    as long as there are files in it.
    """
    return "://" in os.fspath(path)


def path_from(folder: epath.PathLike, path: epath.PathLike) -> str | None:
    """A local path as it is seen from a local folder; None where one of them is in the cloud."""
    if is_cloud(folder) or is_cloud(path):
        return None
    return os.path.relpath(os.path.abspath(os.path.expanduser(path)), os.path.abspath(folder))


def seen_from(folder: epath.PathLike, path: str) -> str:
    """The path that `path_from` was, from where the process runs."""
    return os.path.normpath(os.path.join(folder, path))


def cloud_fault(error: BaseException) -> str | None:
    """What is the matter with an object store, in one line; None: the error is about something else.

    It is a package that is not installed, and the extra that brings it is named, a scheme that is not known, or
    what the store, its network or its sign-in says.
    """
    if isinstance(error, KeyError) and str(error.args[0]).endswith("://"):  # epath's
        known = " and ".join(f"{scheme}://" for scheme in _CLOUD)
        return f"{error.args[0]}: only local paths and those of {known} are known"
    if isinstance(error, ImportError):
        for scheme, (package, extra) in _CLOUD.items():
            if package in str(error):
                return f"{scheme}:// paths need the package {package}: pip install 'imagen_jax[{extra}]'"
    if type(error).__module__.partition(".")[0] not in _CLOUD_CLIENTS:
        return None
    said = " ".join(str(error).split()) or type(error).__name__
    return f"the cloud storage does not answer as it should: {said}"


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
    """Creates a folder with its parents, if it is not there. Object stores have no folders, nor need them.

    Raises:
      UserError: the system refuses; names the folder.
    """
    path = epath.Path(path).expanduser()
    if is_cloud(path):
        return path  # gcsfs and s3fs would make a bucket, too, of a name that is misspelt
    if path.is_file():
        raise UserError(f"{path} is a file; a folder is wanted")
    with _naming_file(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


class AtomicFile:
    """A file under a temporary name (`incomplete.NAME`) that takes its own name when it is complete.

    In an object store, where nothing is to be seen of a file before it is complete, it has its own name at once.

    With a `tag` the temporary name is `incomplete.NAME.TAG`, for files that several processes may write at once.
    As a context manager it commits at the end of the block and discards on any exception.

    Raises:
      UserError: the disk is full or the system refuses otherwise, on opening, on any write, on closing and
        on renaming; names the file. Nothing is left behind.
    """

    def __init__(self, path: epath.PathLike, *, tag: str = ""):
        """Opens the temporary file; an older one of the same name is overwritten."""
        self.path = epath.Path(path)
        self._cloud = is_cloud(self.path)
        self._temporary = self.path.parent / f"incomplete.{self.path.name}{'.' * bool(tag)}{tag}"
        if self._cloud:
            self._temporary = self.path
        with _naming_file(self.path):
            self._file: Any = self._temporary.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        with _naming_file(self.path):
            if not self._cloud:
                self._file.write(data)
                return
            for start in range(0, len(data), _PART):  # its buffer grows to what it is given at once
                self._file.write(data[start : start + _PART])

    def commit(self) -> None:
        """Closes the file and gives it its name; until then readers see nothing of it."""
        with _naming_file(self.path):
            self._file.flush()
            # Without it a power cut can leave a complete name on an empty file.
            with contextlib.suppress(AttributeError, NotImplementedError):
                _sync(self._file)
            self._file.close()
            if not self._cloud:
                self._temporary.replace(self.path)

    def discard(self) -> None:
        """Closes and removes the temporary file."""
        if self._cloud:
            # Closing would complete the upload; so would forgetting the file, which closes it.
            self._file.closed = True
            with contextlib.suppress(OSError):
                self._file.discard()
            return
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


def copy_file(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a file, local or in an object store; the copy appears when it is complete.

    Raises:
      UserError: the disk is full or the system refuses otherwise; names the copy.
    """
    with epath.Path(source).open("rb") as file, AtomicFile(target, tag="partial") as copy:
        while part := file.read(_PART):
            copy.write(part)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Gives a folder another name, at which nothing is; in an object store file by file."""
    if not is_cloud(source):
        source.rename(target)
        return
    for file in files_below(source):
        copy_file(file, target / file.relative_to(source))
    source.rmtree()


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files of a folder and of those in it."""
    if not is_cloud(folder):
        for parent, _, names in folder.walk():
            yield from (parent / name for name in names)
        return
    # Not by `walk`, which leaves the scheme out and does not work in S3.
    storage, name = cloud_storage(folder)
    scheme = os.fspath(folder).partition("://")[0]
    for file in storage.find(name):
        if not file.endswith("/"):  # that stands for an empty folder
            yield epath.Path(f"{scheme}://{file.lstrip('/')}")


def cloud_storage(path: epath.PathLike) -> tuple[Any, str]:
    """The file system of a cloud path, by fsspec, and the path's name there."""
    from fsspec.core import url_to_fs  # only here: commands on local files do not wait for it

    return url_to_fs(os.fspath(path))


# JSON files are configurations, indices and tokenizers: the largest vocabularies take 40 MB.
_JSON_BYTES = 256 * 2**20
_T = TypeVar("_T")
_MISSING = object()
_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


def check_regular(path: epath.PathLike) -> None:
    """Refuses what would block a reader or never end: pipes, devices, sockets.

    Raises:
      UserError: a local path is there and is neither a file nor a folder.
    """
    if is_cloud(path):
        return
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # missing, or no name of a file at all: for its reader to say
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: a pipe or a device, not a file")


def check_no_pointer(beginning: bytes, path: epath.PathLike) -> None:
    """Refuses Git LFS's stand-in for a file.

    Args:
      beginning: of the file's content, at least 64 bytes of it.
      path: of the file.

    Raises:
      UserError: it is one.
    """
    if beginning.startswith(_LFS_POINTER):
        raise UserError(f"{path}: a Git LFS pointer, not the file; run git lfs pull in its folder")


def exists(path: epath.PathLike) -> bool:
    """Whether there is such a file or folder.

    Raises:
      UserError: it is a link that leads nowhere, its kind of address ("http://") is not read, or its storage does
        not answer; names it.
    """
    try:
        there = epath.Path(path).exists()
    except Exception as error:
        if (fault := cloud_fault(error)) is None:
            raise
        raise UserError(f"{path}: {fault}") from error
    if not there and not is_cloud(path) and os.path.islink(path):
        raise UserError(f"{path}: a link that leads nowhere")
    return there


def read_bytes(path: epath.PathLike, *, limit: int | None = None) -> bytes:
    """Reads a whole file.

    Args:
      path: local or cloud file.
      limit: bytes that it may have; None: any number.

    Raises:
      UserError: it is missing, no ordinary file, a Git LFS pointer, larger than `limit`, or the system refuses;
        names it.
    """
    path = epath.Path(path)
    check_regular(path)
    try:
        if limit is not None and (size := int(path.stat().length)) > limit:
            raise UserError(f"{path}: {size} bytes, where at most {limit} are read")
        content = path.read_bytes()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: {reason}") from error
    check_no_pointer(content, path)
    return content


def read_given(path: epath.PathLike, flag: str, *, limit: int) -> bytes:
    """The content of a file that a flag names.

    Raises:
      UserError: there is no such file, or it cannot be read or is longer than `limit` bytes; names the flag.
    """
    try:
        check_regular(path)
        if not exists(path):
            raise UserError(f"{path}: there is no such file")
        return read_bytes(path, limit=limit)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """Reads JSON from anybody; a byte order mark is passed over.

    Args:
      text: the JSON; bytes are UTF-8.
      where: file or record, for messages.

    Raises:
      UserError: it is not UTF-8, not JSON, nested too deeply, or holds half a character (a lone surrogate),
        which no file can take again.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded.removeprefix("\ufeff"))
        if "\\ud" in decoded.lower() or not isinstance(text, bytes):  # cheap where it cannot be
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{where}: JSON that is nested too deeply") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: JSON with half a character (a lone surrogate)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    return value


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      UserError: as `read_bytes` and `parse_json`, or it holds something else; names the file.
    """
    return json_object(parse_json(read_bytes(path, limit=_JSON_BYTES), str(path)), str(path))


def json_object(value: Any, where: str) -> dict[str, Any]:
    """The value, which has to be a JSON object.

    Raises:
      UserError: it is something else; names `where`.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, got {shown(value)}")
    return value


def json_field(
    content: Mapping[str, Any], name: str, kind: type[_T], where: str, *, default: Any = _MISSING
) -> _T:
    """A field of a JSON object, of the type that it has to have.

    Args:
      content: the object.
      name: of the field.
      kind: str, bool, int, float (whole numbers are taken too), dict or list.
      where: file or record, for messages.
      default: what a missing field means; without it the field has to be there.

    Raises:
      UserError: it is missing or of another type; names `where` and the field.
    """
    if name not in content:
        if default is _MISSING:
            raise UserError(f"{where}: the field {name!r} is missing")
        return default
    value = content[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: {name!r} must be {_KINDS[kind]}, got {shown(value)}")
    return value
