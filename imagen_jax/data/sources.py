"""The SPEC of `--source` and what it opens."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from PIL import Image

from imagen_jax.data import shapes, shapes_render, shapes_world
from imagen_jax.data.examples import Example, Skipped, Source, even_ranges, one_line, printable
from imagen_jax.data.folder import EXAMPLES_PER_UNIT, FolderOptions, FolderSource
from imagen_jax.data.parquet import ParquetOptions, ParquetSource
from imagen_jax.data.tfds_source import TfdsOptions, TfdsSource
from imagen_jax.data.webdataset import WebDatasetOptions, WebDatasetSource
from imagen_jax.errors import UserError
from imagen_jax.limits import is_count, shown

_MAX_SHAPES = 10_000_000  # pictures: scenes repeat long before
_OBJECTS = {"1": 1, "2": 2, "any": None}
_CHOICES = {
    "language": ("en", "zh", "both"),
    "objects": ("1", "2", "equal", "any"),
    "world": ("plain", "rich"),
    "jitter": ("narrow", "wide"),
    "siblings": ("no", "yes"),
    "captions": ("whole", "short"),
}
_SHAPES_FORM = "count=N,resolution=PIXELS," + ",".join(
    f"{name}={'|'.join(_CHOICES[name])}" for name in _CHOICES
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesOptions:
    """The embedded data set's options in SPEC.

    Raises:
      UserError: a value is out of range.
    """

    count: int = 20_000  # pictures
    resolution: int = 64  # side in pixels
    language: str = "en"  # en, zh or both (then two captions per picture)
    objects: str = "any"  # shapes per picture: 1, 2, equal (2 to 4 of one kind) or any
    world: str = "plain"  # rich: also equal objects, textures, and sizes within pairs
    jitter: str = "narrow"  # wide: objects anywhere
    siblings: str = "no"  # yes: families of four that differ in one thing
    captions: str = "whole"  # short: half of them leave out the background, sizes or textures

    def __post_init__(self):
        """Checks the values."""
        if (
            not 1 <= self.count <= _MAX_SHAPES
            or not shapes.MIN_RESOLUTION <= self.resolution <= shapes.MAX_RESOLUTION
        ):
            raise UserError(
                f"--source: shapes wants count from 1 to {_MAX_SHAPES} and resolution "
                f"from {shapes.MIN_RESOLUTION} to {shapes.MAX_RESOLUTION}, "
                f"got count={self.count}, resolution={self.resolution}"
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--source: shapes wants {name}={'|'.join(choices)}, got {value!r}")
        for name, value in (
            ("objects", "equal"),
            ("jitter", "wide"),
            ("siblings", "yes"),
            ("captions", "short"),
        ):
            if self.world == "plain" and getattr(self, name) == value:
                raise UserError(f"--source: shapes has {name}={value} with world=rich only")

    @classmethod
    def parse(cls, text: str) -> "ShapesOptions":
        """Reads `count=…,resolution=…,language=…` and so on."""
        options: dict[str, str | int] = {}
        for item in filter(None, text.split(",")):
            name, equals, value = item.partition("=")
            if not equals or name not in {field.name for field in dataclasses.fields(cls)}:
                raise UserError(
                    f"--source: shapes has no option {item!r} (accepted: {_SHAPES_FORM.replace(',', ', ')})"
                )
            if name in ("count", "resolution"):
                if not is_count(value):
                    raise UserError(f"--source: shapes wants a whole number for {name}, got {shown(value)}")
                options[name] = int(value)
            else:
                options[name] = value
        return cls(**options)  # type: ignore[arg-type]


class ShapesSource(Source):
    """The embedded data set, drawn when it is read."""

    def __init__(self, options: ShapesOptions, split: str, limit: int | None):
        """Draws nothing yet."""
        known = [member.value for member in shapes.Split]
        if split not in known:
            raise UserError(f"--split: shapes has {', '.join(known)}, not {split!r}")
        self._options = options
        self._split = split
        self._count = options.count if limit is None else min(limit, options.count)

    @property
    def size(self) -> int:
        """Number of pictures."""
        return self._count

    def fingerprint(self) -> str:
        """The options are all there is; those of the rich world are named where it is drawn."""
        rich = self._options.world == "rich"
        siblings = self._options.siblings == "yes"
        names = ("count", "resolution", "language", "objects", *(("world", "jitter") if rich else ()))
        names = (*names, "siblings") if siblings else names
        names = (*names, "captions") if self._options.captions == "short" else names
        values = ", ".join(f"{name}={getattr(self._options, name)!r}" for name in names)
        return f"{ShapesOptions.__name__}({values})"

    def units(self, count: int | None = None) -> Sequence[range]:
        """Ranges of picture numbers."""
        return even_ranges(self._count, count or math.ceil(self._count / EXAMPLES_PER_UNIT))

    def read(self, unit: range) -> Iterator[Example | Skipped]:
        """Draws the pictures of a range, as PNG."""
        options = self._options
        for index in unit:
            scene = self._scene(index)
            encoded = io.BytesIO()
            Image.fromarray(shapes_render.render(scene, options.resolution)).save(encoded, "PNG")
            both = scene.caption, scene.caption_zh
            if options.captions == "short":
                both = shapes_world.short_captions(scene, index, split=self._split)
            captions = {"en": both[:1], "zh": both[1:], "both": both}[options.language]
            key = f"{self._split}-{index:08d}"
            yield Example(file="shapes", key=key, image=encoded.getvalue(), captions=captions)

    def _scene(self, index: int) -> shapes.Scene:
        options = self._options
        if options.world == "plain":
            return shapes.scene(index, split=self._split, objects=_OBJECTS[options.objects])
        kind = None if options.objects == "any" else shapes_world.Kind(options.objects)
        draw = shapes_world.sibling_scene if options.siblings == "yes" else shapes_world.world_scene
        return draw(index, split=self._split, kind=kind, jitter=shapes_world.Jitter(options.jitter))


_Options = TypeVar("_Options")


def parse_options(kind: str, text: str, options: type[_Options]) -> _Options:
    """Reads `FIRST,key=value,…` into a dataclass of texts, whose first field is FIRST.

    A comma divides only before a `key=`, so that FIRST may have commas in it.

    Raises:
      UserError: an option that the dataclass has no field for, or FIRST is empty.
    """
    first, *rest = re.split(r",(?=[a-z_]+=)", text)
    name, *others = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    values = {name: first}
    for item in rest:
        key, _, value = item.partition("=")
        if key not in others or not value:
            accepted = ", ".join(f"{other}=…" for other in others)
            raise UserError(f"--source: {kind} has no option {item!r} (accepted: {accepted})")
        values[key] = value
    if not first:
        raise UserError(f"--source: {kind} wants its {name} first: {kind}:{name.upper()}")
    return options(**values)


_Opener = Callable[[str, str, int | None], Source]
# Form of SPEC for messages, and what opens (text after the colon, split, limit).
_SOURCES: dict[str, tuple[str, _Opener]] = {
    "shapes": (
        f"shapes[:{_SHAPES_FORM}]",
        lambda text, split, limit: ShapesSource(ShapesOptions.parse(text), split, limit),
    ),
    "webdataset": (
        "webdataset:PATH/*.tar[,image=EXTENSION,text=EXTENSION]",
        lambda text, split, limit: WebDatasetSource(
            parse_options("webdataset", text, WebDatasetOptions), limit
        ),
    ),
    "folder": (
        "folder:PATH[,image=EXTENSION,text=FIELD,outside=true]",
        lambda text, split, limit: FolderSource(parse_options("folder", text, FolderOptions), limit),
    ),
    "tfds": (
        "tfds:NAME[,image=FEATURE,text=FEATURE,key=FEATURE,split=SPLIT,data_dir=DIR]",
        lambda text, split, limit: TfdsSource(parse_options("tfds", text, TfdsOptions), split, limit),
    ),
    "parquet": (
        "parquet:PATH[,image=COLUMN,text=COLUMN,key=COLUMN]",
        lambda text, split, limit: ParquetSource(parse_options("parquet", text, ParquetOptions), limit),
    ),
}


def accepted_forms() -> str:
    """The forms of SPEC, for help texts and messages."""
    return ", ".join(form for form, _ in _SOURCES.values())


def open_source(spec: str, *, split: str = "train", limit: int | None = None) -> Source:
    """Opens a source of captioned pictures.

    Args:
      spec: `shapes`, `webdataset:PATH/*.tar`, `folder:PATH`, `tfds:NAME` or `parquet:PATH` (see `accepted_forms`).
      split: which part of `shapes` is drawn or of a TFDS data set is read; the others take what their path names.
      limit: only the first so many samples, damaged ones included.

    Raises:
      UserError: not such a SPEC, or nothing there.
    """
    kind, colon, text = spec.partition(":")
    if kind not in _SOURCES or (kind != "shapes" and not text) or (kind == "shapes" and colon and not text):
        raise UserError(f"--source: {spec!r} is not one of the accepted forms: {accepted_forms()}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit: must be at least 1, got {limit}")
    if printable(text) != text and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
        raise UserError(f"--source: {printable(spec)!r} is not UTF-8, or holds a zero byte")
    try:
        return _SOURCES[kind][1](text, split, limit)
    except OSError as error:
        raise UserError(f"--source: {spec!r}: {error.strerror or one_line(error)}") from error
