"""`folder:PATH`: pictures with a captions.jsonl or metadata.jsonl, or a .txt beside each."""

import dataclasses
import functools
import hashlib
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from imagen_jax.data.examples import (
    CAPTION_BYTES,
    PICTURE_BYTES,
    Example,
    Skipped,
    Source,
    UnusableError,
    attempt,
    caption_lines,
    clean_captions,
    even_ranges,
    read_file,
)
from imagen_jax.data.picture_kinds import is_picture_name
from imagen_jax.errors import UserError
from imagen_jax.files import files_below, is_cloud, parse_json, read_bytes

EXAMPLES_PER_UNIT = 1024  # about 200 MB with the embeddings of the largest T5
_LISTINGS = ("captions.jsonl", "metadata.jsonl")  # the first of them in a folder is read
_OUTSIDE = "leads out of the folder"
_OUTSIDE_ADVICE = "outside=true reads it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """What `folder:PATH,…` says.

    Raises:
      UserError: `outside` is neither true nor false.
    """

    path: str  # local or cloud
    image: str | None = None  # extension of the pictures; None: every kind of picture
    text: str | None = None  # field of the listing with the caption or captions; None: `caption`, else `text`
    outside: str = (
        "false"  # whether files outside the folder may be read: through links, `..`, absolute paths
    )

    def __post_init__(self):
        """Checks the values."""
        if self.outside not in ("true", "false"):
            raise UserError(f"--source: folder wants outside=true|false, got {self.outside!r}")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One picture or one fault."""

    name: str  # file name relative to the folder
    captions: tuple[str, ...] | None  # None: to be read from `text`
    fault: str = ""
    detail: str = dataclasses.field(default="", repr=False)
    text: str = dataclasses.field(default="", repr=False)  # file with the captions, relative to the folder


def _walk_local(root: str, follow: bool) -> tuple[list[str], list[_Entry]]:
    """Names of the files below a folder, relative to it, and the folders in it that are not read.

    A link to a folder that is read anyway is passed over, so that nothing comes twice and no walk is endless.
    """
    names: list[str] = []
    faults: list[_Entry] = []
    real = os.path.realpath(root)
    followed = {real}
    unread: list[OSError] = []
    for folder, below, files in os.walk(root, followlinks=True, onerror=unread.append):
        inner = os.path.relpath(folder, root)
        prefix = "" if inner == "." else f"{inner}/"
        names += [prefix + name for name in files]
        kept = []
        for name in sorted(below):
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                kept.append(name)
                continue
            target = os.path.realpath(path)
            if target in followed or os.path.commonpath([target, real]) in (target, real):
                continue
            if follow:
                followed.add(target)
                kept.append(name)
            else:
                faults.append(_Entry(prefix + name, None, _OUTSIDE, _OUTSIDE_ADVICE))
        below[:] = kept
    for error in unread:
        name = os.path.relpath(os.fspath(error.filename), root)
        faults.append(_Entry(name, None, "folder cannot be read", error.strerror or ""))
    return names, faults


def _walk(root: epath.Path, follow: bool) -> tuple[list[str], list[_Entry]]:
    """As `_walk_local`, in the order of the names and without hidden files; cloud folders have no links."""
    faults: list[_Entry] = []
    if is_cloud(root):
        names = [os.fspath(file.relative_to(root)) for file in files_below(root)]
    else:
        names, faults = _walk_local(os.fspath(root), follow)
    return sorted(name for name in names if not posixpath.basename(name).startswith(".")), faults


def _parse_line(number: int, line: bytes, listing: str, field: str | None) -> _Entry:
    """One line of a captions.jsonl or metadata.jsonl."""
    folder, kind = posixpath.split(listing)
    where = f"line {number}" if not folder else f"{folder} line {number}"
    try:
        content = parse_json(line, where)
    except UserError as error:
        return _Entry(where, None, f"{kind} line is not JSON", str(error))
    if not isinstance(content, dict) or not isinstance(content.get("file_name"), str):
        return _Entry(where, None, f"{kind} line without file_name")
    name = posixpath.join(folder, content["file_name"])
    name = posixpath.normpath(name) if content["file_name"] else name
    fields = (field,) if field else ("caption", "text")
    captions = next((content[wanted] for wanted in fields if content.get(wanted)), None)
    captions = clean_captions(captions if isinstance(captions, list) else [captions])
    return _Entry(name, captions, "" if captions else "no caption")


def _listings(names: Sequence[str]) -> dict[str, str]:
    """The listing of each folder that has one; those below a folder with a listing are not looked at."""
    listings: dict[str, str] = {}
    for wanted in _LISTINGS:
        for name in names:
            if posixpath.basename(name) == wanted:
                listings.setdefault(posixpath.dirname(name), name)
    return {
        folder: name
        for folder, name in sorted(listings.items())
        if not any(_is_below(folder, other) for other in listings if other != folder)
    }


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _read_listing(data: bytes, listing: str, options: FolderOptions) -> list[_Entry]:
    """The pictures of a listing in the order of its lines; the lines of one picture together give its captions."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    entries: dict[str | int, _Entry] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = _parse_line(number, line, listing, options.text)
        if entry.captions is None:  # the line names no picture; some picture may have its label for a name
            entries[number] = entry
            continue
        before = entries.get(entry.name)
        if before is not None and before.captions and entry.captions:
            entry = dataclasses.replace(before, captions=before.captions + entry.captions)
        elif before is not None and before.captions:
            entry = before
        entries[entry.name] = entry
    return list(entries.values())


def _once(entries: Sequence[_Entry]) -> list[_Entry]:
    """The entries with a fault in the place of those whose picture an earlier one has: several listings name it."""
    seen: set[str] = set()
    kept = []
    for entry in entries:
        if not entry.fault and entry.name in seen:
            entry = _Entry(entry.name, None, "picture of two listings")
        elif not entry.fault:
            seen.add(entry.name)
        kept.append(entry)
    return kept


def _beside(names: Sequence[str], image: str | None) -> list[_Entry]:
    """The pictures with the .txt of the same stem; captions without a picture that is read become faults."""
    there = set(names)
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    entries = []
    for stem, files in stems.items():
        texts = [name for name in files if name.lower().endswith(".txt")]
        others = [name for name in files if name not in texts]
        pictures = [name for name in others if _is_wanted(name, image)]
        text = next((name for name in texts if name == f"{stem}.txt"), texts[0] if texts else "")
        entries += [_Entry(name, None, "second caption file") for name in texts if name != text]
        if not texts:
            entries += [_Entry(name, None, "no caption") for name in pictures]
        elif len(pictures) == 1:
            entries.append(_Entry(pictures[0], None, text=text))
        elif pictures:
            advice = f"one caption for {', '.join(pictures)}; name the kind with ,image=EXTENSION"
            entries += [_Entry(name, None, "several pictures", advice) for name in pictures]
        elif stem not in there:  # that would be the text of a file such as NAME.jpg.txt
            unread = [name for name in others if not name.lower().endswith(".json")]
            fault = "kind of file not read" if unread else "no picture"
            entries.append(_Entry(unread[0] if unread else text, None, fault))
    return sorted(entries, key=lambda entry: entry.name)


def _is_wanted(name: str, image: str | None) -> bool:
    """Whether a file is a picture, of the extension asked for."""
    return is_picture_name(name) if image is None else name.lower().endswith(f".{image.lower().lstrip('.')}")


class FolderSource(Source):
    """Pictures of a folder and the folders in it.

    With `captions.jsonl` or Hugging Face's `metadata.jsonl` (one object per line: `file_name` and `caption` or
    `text`, a text or a list of texts) in the order of its lines; without it in the order of the names, each
    with the .txt of the same stem, one caption a line.

    Raises:
      UserError: no such folder or nothing in it, or its listing leads out of it.
    """

    def __init__(self, options: FolderOptions, limit: int | None):
        """Lists the folder."""
        self._root = epath.Path(options.path).expanduser()
        self._options = options
        self._outside = options.outside == "true"
        if not self._root.is_dir():
            raise UserError(f"--source: no folder {options.path!r}")
        names, entries = _walk(self._root, self._outside)
        listings = _listings(names)
        pictures = [name for name in names if _is_wanted(name, options.image)]
        for listing in listings.values():
            try:
                data = read_bytes(self._path(listing))
            except UnusableError as fault:
                raise UserError(f"--source: {self._root / listing} {fault}") from None
            entries += _read_listing(data, listing, options)
        named = {entry.name for entry in entries}
        covered = [name for name in names if any(_is_below(name, folder) for folder in listings)]
        unnamed = set(covered) - named
        entries += [_Entry(name, None, "no caption") for name in pictures if name in unnamed]
        beside = names if not covered else sorted(set(names) - set(covered))
        entries += _beside(beside, options.image)
        if not entries:
            kind = f".{options.image}" if options.image else ".png, .jpg, .webp, …"
            raise UserError(f"--source: no pictures ({kind}) in folder {options.path!r}")
        entries = _once(entries)
        self._keys = _keys(entries)
        self._entries = entries[:limit]

    @property
    def size(self) -> int:
        """Number of pictures and faulty lines."""
        return len(self._entries)

    def fingerprint(self) -> str:
        """Hash of names and captions (not of the pictures: that would mean reading them all)."""
        return hashlib.sha256(repr(self._entries).encode("utf-8")).hexdigest()[:16]

    def units(self, count: int | None = None) -> Sequence[range]:
        """Ranges of the list."""
        return even_ranges(self.size, count or math.ceil(self.size / EXAMPLES_PER_UNIT))

    def read(self, unit: range) -> Iterator[Example | Skipped]:
        """Reads the pictures of a range."""
        for index in unit:
            entry = self._entries[index]
            file = os.path.join(os.fspath(self._root), entry.name)
            yield attempt(functools.partial(self._example, entry), file=file, key=entry.name)

    def _example(self, entry: _Entry) -> Example:
        """Reads one picture and its captions."""
        if entry.fault:
            raise UnusableError(entry.fault, entry.detail)
        captions = entry.captions
        if captions is None:
            captions = clean_captions(caption_lines(read_file(self._path(entry.text), CAPTION_BYTES)))
        if not captions:
            raise UnusableError("no caption")
        path = self._path(entry.name)
        try:
            image = read_file(path, PICTURE_BYTES)
        except FileNotFoundError:
            raise UnusableError("no picture") from None
        return Example(file=os.fspath(path), key=self._keys[entry.name], image=image, captions=captions)

    def _path(self, name: str) -> epath.Path:
        """The file of this name relative to the folder.

        Raises:
          UnusableError: it lies outside the folder, by its name or through a link, and that is not allowed.
        """
        root = os.fspath(self._root)
        path = os.path.join(root, name)
        if self._outside:
            return epath.Path(path)
        if "://" in root:
            leads_out = name.startswith("/") or "://" in name or posixpath.normpath(name).startswith("../")
        else:
            real = os.path.realpath(root)
            leads_out = os.path.commonpath([os.path.realpath(path), real]) != real
        if leads_out:
            raise UnusableError(_OUTSIDE, _OUTSIDE_ADVICE)
        return epath.Path(path)


def _keys(entries: Sequence[_Entry]) -> Mapping[str, str]:
    """Keys of the pictures: the name without its extension; where others have that for theirs, the whole name.

    A further caption of KEY has the key KEY#1, which no picture may have then.
    """
    keys = {entry.name: os.path.splitext(entry.name)[0] for entry in entries if not entry.fault}
    shared = Counter(keys.values())
    while True:
        taken = [name for name, key in keys.items() if key != name and _is_taken(key, shared)]
        if not taken:
            return keys
        keys |= {name: name for name in taken}
        shared = Counter(keys.values())


def _is_taken(key: str, shared: Counter[str]) -> bool:
    first, sign, number = key.rpartition("#")
    return shared[key] > 1 or (bool(sign) and number.isdigit() and first in shared)
