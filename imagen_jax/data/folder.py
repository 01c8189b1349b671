"""`folder:PATH`: pictures with a captions.jsonl or a .txt beside each."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence

from etils import epath

from imagen_jax.data.examples import Example, Skipped, Source, clean_captions, even_ranges
from imagen_jax.errors import UserError
from imagen_jax.files import files_below

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EXAMPLES_PER_UNIT = 1024  # about 200 MB with the embeddings of the largest T5


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One picture or one faulty line."""

    name: str  # file name relative to the folder
    captions: tuple[str, ...] | None  # None: to be read from the .txt beside the picture
    fault: str = ""


def _parse_line(number: int, line: str) -> _Entry:
    """One line of captions.jsonl."""
    try:
        content = json.loads(line)
    except ValueError:
        return _Entry(f"line {number}", None, "captions.jsonl line is not JSON")
    if not isinstance(content, dict) or not isinstance(content.get("file_name"), str):
        return _Entry(f"line {number}", None, "captions.jsonl line without file_name")
    captions = content.get("caption")
    captions = clean_captions(captions if isinstance(captions, list) else [captions])
    return _Entry(content["file_name"], captions, "" if captions else "no caption")


class FolderSource(Source):
    """Pictures of a folder and the folders in it.

    With `captions.jsonl` (one object per line: `file_name`, `caption`, a text or a list of texts) in the
    order of its lines; without it in the order of the names, each with the .txt of the same stem.

    Raises:
      UserError: no such folder or nothing in it.
    """

    def __init__(self, path: str, limit: int | None):
        """Lists the folder."""
        self._root = epath.Path(path).expanduser()
        if not self._root.is_dir():
            raise UserError(f"--source: no folder {path!r}")
        pictures = sorted(
            os.fspath(file.relative_to(self._root))
            for file in files_below(self._root)
            if file.name.lower().endswith(PICTURE_SUFFIXES) and not file.name.startswith(".")
        )
        listing = self._root / "captions.jsonl"
        if listing.exists():
            lines = listing.read_text(encoding="utf-8").splitlines()
            entries = [_parse_line(i, line) for i, line in enumerate(lines, 1) if line.strip()]
            named = {entry.name for entry in entries}
            entries += [_Entry(name, None, "no caption") for name in pictures if name not in named]
        else:
            entries = [_Entry(name, None) for name in pictures]
        if not entries:
            raise UserError(f"--source: no pictures ({', '.join(PICTURE_SUFFIXES)}) in folder {path!r}")
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
            file = self._root / entry.name
            fault, detail, captions, image = entry.fault, "", entry.captions, b""
            try:
                if not fault and captions is None:
                    text = file.with_suffix(".txt")
                    captions = clean_captions([text.read_text(encoding="utf-8")]) if text.exists() else ()
                    fault = "" if captions else "no caption"
                if not fault:
                    image = file.read_bytes()
            except FileNotFoundError:
                fault = "no picture"
            except UnicodeDecodeError as error:
                fault, detail = "caption is not UTF-8", str(error)
            if fault:
                yield Skipped(file=os.fspath(file), key=entry.name, reason=fault, detail=detail)
            else:
                key = os.path.splitext(entry.name)[0]
                yield Example(file=os.fspath(file), key=key, image=image, captions=captions or ())
