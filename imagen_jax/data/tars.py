"""The members of a tar by sample, with what is damaged named: what `webdataset:` is made of."""

import contextlib
import dataclasses
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from imagen_jax.data.examples import READ_ERRORS, UnusableError, fault_of, is_lfs_pointer
from imagen_jax.data.patterns import open_file

# Zeros that writers leave at the end: two blocks, and what fills the last record.
_END = 2 * tarfile.RECORDSIZE
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # gzip, bzip2, xz

# What a member holds; UnusableError if it cannot be had, None if nobody wants it.
Content = bytes | UnusableError | None
# Whether the content of a member is wanted: offset of the sample's first header, key, extension.
Wanted = Callable[[int, str, str], bool]


class DamagedTarError(Exception):
    """A tar breaks off before its end marker."""

    def __init__(self, message: str, *, position: int, sample: int = 0, key: str = ""):
        """Takes the byte where it breaks off, and offset and key of the sample that this concerns."""
        super().__init__(message)
        self.position = position
        self.sample = sample
        self.key = key


@dataclasses.dataclass
class Run:
    """Consecutive members of one key."""

    key: str
    offset: int  # bytes: of the first header
    contents: dict[str, Content]  # by extension, of the members before the first repeated extension
    counts: Counter[str]  # members by extension
    parts: int = 1  # into which the repeated extensions divide the run

    @property
    def samples(self) -> int:
        """Samples in the run: as many as the most frequent extension."""
        return max(self.counts.values())

    @property
    def in_order(self) -> bool:
        """Whether the samples stand one after the other, so that it is clear which member belongs to which."""
        return self.parts == self.samples


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: split at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _is_sample(member: tarfile.TarInfo) -> bool:
    """Whether a member belongs to a sample: not to the Finder, nor to a format that its reader did not know."""
    *folders, base = member.name.split("/")
    foreign = base.startswith(".") or base == "@PaxHeader" or "__MACOSX" in folders
    return not (member.isdir() or foreign or any(folder.startswith("PaxHeaders") for folder in folders))


@contextlib.contextmanager
def open_tar(path: epath.Path | str, *, packed: bool) -> Iterator[tarfile.TarFile]:
    """Opens a tar.

    Args:
      path: file, or the URL of one.
      packed: whether it may be compressed.

    Raises:
      DamagedTarError: it has not a single good header.
      UserError: as `open_file`.
      OSError: as `open_file`.
    """
    with open_file(path) as file, contextlib.ExitStack() as opened:
        try:
            mode: Any = "r:*" if packed else "r:"
            tar = opened.enter_context(tarfile.open(fileobj=file, mode=mode, encoding="utf-8"))
        except READ_ERRORS as error:
            fault = fault_of(error, str(path))
            file.seek(0)
            start = file.read(tarfile.BLOCKSIZE)
            if is_lfs_pointer(start):
                fault = "a Git LFS pointer; git lfs pull fetches the file"
            elif start.startswith(_PACKED) and not packed:
                fault = "it is compressed: name it .tar.gz, .tar.bz2 or .tar.xz"
            raise DamagedTarError(fault, position=0) from error
        yield tar


def _next_archive(tar: tarfile.TarFile) -> bool:
    """At a broken header, which tarfile takes for the end: moves on to an archive that was put behind this one.

    Raises:
      DamagedTarError: this is not the end.
    """
    file: Any = tar.fileobj
    start = tar.offset
    file.seek(start)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        fault = "no end marker" if len(block) < tarfile.BLOCKSIZE else "broken header"
        raise DamagedTarError(fault, position=start)
    zeros = len(block)
    while chunk := file.read(2**20):
        more = len(chunk) - len(chunk.lstrip(b"\0"))
        zeros += more
        if more < len(chunk):
            tar.offset = start + zeros - zeros % tarfile.BLOCKSIZE
            return True
    if zeros > _END:
        raise DamagedTarError(f"{zeros} bytes of zeros at its end", position=start)
    return False


def _members(tar: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that belong to samples; raises DamagedTarError where it breaks off."""
    end: int | None = None  # where the last archive ended
    while True:
        try:
            member = tar.next()
            if member is None:
                start = tar.offset
                if not _next_archive(tar):
                    return
                end = start
                continue
        except DamagedTarError as damage:
            if end is not None:  # what follows the zeros is no archive: these were not the end
                damage.position = end
            raise
        except READ_ERRORS as error:
            raise DamagedTarError(fault_of(error, name), position=tar.offset) from error
        end = None
        if _is_sample(member):
            yield member


def _content(
    tar: tarfile.TarFile, member: tarfile.TarInfo, before: Mapping[str, tarfile.TarInfo], limit: int
) -> bytes | UnusableError:
    """Reads a member; raises what tarfile does if the data breaks off.

    A hard link is what tar makes of a file that it has packed already; `before` are the files so far, by name.
    """
    target = before.get(member.linkname, member) if member.islnk() else member
    if not target.isreg():
        return UnusableError("a link or a device in the tar", f"{member.name} is no file")
    if target.size > limit:
        return UnusableError("too large", f"{target.size} bytes, where at most {limit} are read")
    opened = tar.extractfile(target)
    data = b"" if opened is None else opened.read()
    if len(data) != target.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def runs(tar: tarfile.TarFile, name: str, wanted: Wanted, limit: int) -> Iterator[Run]:
    """Collects consecutive members of the same key; a broken tar still yields its last run first.

    Contents are read as the members come, because a compressed tar cannot go back.

    Args:
      tar: opened, at its start.
      name: of the file, for messages.
      wanted: says which contents are read.
      limit: bytes that a member may have to be read.

    Raises:
      DamagedTarError: the tar breaks off.
      UserError: the machine or the network fails.
    """
    run: Run | None = None
    part: set[str] = set()
    before: dict[str, tarfile.TarInfo] = {}
    try:
        for member in _members(tar, name):
            if member.isreg():
                before[member.name] = member
            key, extension = split_name(member.name)
            if run is None or key != run.key:
                if run is not None:
                    yield run
                run = Run(key, member.offset, {}, Counter())
                part = set()
            if extension in part:
                run.parts += 1
                part = set()
            part.add(extension)
            run.counts[extension] += 1
            if run.parts > 1:
                continue
            run.contents[extension] = None
            if wanted(run.offset, key, extension):
                try:
                    run.contents[extension] = _content(tar, member, before, limit)
                except READ_ERRORS as error:
                    fault, broken, run = fault_of(error, name), run, None
                    raise DamagedTarError(
                        fault, position=member.offset, sample=broken.offset, key=key
                    ) from error
    except DamagedTarError as damage:
        if run is not None:
            yield run
            damage.sample = run.offset
        raise
    if run is not None:
        yield run
