"""The captions of the embedded captioned data: all of them, their words, and the way back to the scene."""

import enum
import itertools
import re
from collections.abc import Iterator

from imagen_jax.data.shapes import (
    ALL_PAIRS,
    NUMBERS,
    NUMBERS_ZH,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
    Texture,
)

_KINDS: tuple[type[enum.Enum], ...] = (Colour, Shape, Size, Texture, Relation)
_COUNTS = {"a": 1, "an": 1} | {word: number for number, word in NUMBERS.items()}
_COUNTS_ZH = {word: number for number, word in NUMBERS_ZH.items()}


def _chinese(item: enum.Enum) -> str:
    assert isinstance(item, (Colour, Shape, Size, Texture, Relation))
    return item.zh


def _names(kind: type[enum.Enum], *, zh: bool = False) -> dict[str, enum.Enum]:
    return {_chinese(item) if zh else item.value: item for item in kind if item is not Texture.SOLID}


def _one_of(kind: type[enum.Enum], *, zh: bool = False) -> str:
    return "(" + "|".join(_names(kind, zh=zh)) + ")"


_OBJECT = f"({'|'.join(_COUNTS)}) (?:{_one_of(Size)} )?(?:{_one_of(Texture)} )?{_one_of(Colour)} {_one_of(Shape)}(e?s)?"
_OBJECT_ZH = (
    f"({'|'.join(_COUNTS_ZH)})个(?:{_one_of(Size, zh=True)}的)?{_one_of(Texture, zh=True)}?"
    f"{_one_of(Colour, zh=True)}{_one_of(Shape, zh=True)}"
)
_ENGLISH = re.compile(f"{_OBJECT}(?: {_one_of(Relation)} {_OBJECT})? on an? {_one_of(Colour)} background")
_CHINESE = re.compile(f"{_one_of(Colour, zh=True)}背景上有{_OBJECT_ZH}")
_CHINESE_PAIR = re.compile(
    f"{_one_of(Colour, zh=True)}背景上，{_OBJECT_ZH}在{_OBJECT_ZH}的{_one_of(Relation, zh=True)}"
)


def parse(caption: str) -> Scene:
    """Reads an English or Chinese caption back: the scene it describes, with the objects unshifted.

    Raises:
        ValueError: The caption is not one of this data set's; the message quotes it.
    """
    try:
        parsed = _read(caption)
    except ValueError as error:
        raise ValueError(f"not a caption of the embedded data: {caption!r}: {error}") from error
    if parsed is None or _plain(caption) not in (_plain(parsed.caption), parsed.caption_zh):
        raise ValueError(f"not a caption of the embedded data: {caption!r}")
    return parsed


def _plain(caption: str) -> str:
    """The caption with every article "a": "a orange circle" is understood, "two circle" is not."""
    return re.sub(r"\ban\b", "a", caption)


def _read(caption: str) -> Scene | None:
    """The scene of a caption whose words are in order; None for others. Raises ValueError for an impossible scene."""
    english = _ENGLISH.fullmatch(caption)
    if english:
        *first, relation = english.groups()[:7]
        second, ground = english.groups()[7:13], english.groups()[13]
        return _scene([first[:5], second[:5]], relation, ground, zh=False)
    match = _CHINESE.fullmatch(caption) or _CHINESE_PAIR.fullmatch(caption)
    if match is None:
        return None
    ground, *words = match.groups()
    relation = words[10] if len(words) > 5 else None
    return _scene([words[:5], words[5:10]], relation, ground, zh=True)


def _scene(objects: list, relation: str | None, ground: str, *, zh: bool) -> Scene:
    """A scene of words: of each object count, size, texture, colour and shape."""
    known: dict[str, enum.Enum] = {
        word: item for kind in _KINDS for word, item in _names(kind, zh=zh).items()
    }
    counts = _COUNTS_ZH if zh else _COUNTS
    items: list[SceneObject] = []
    for count, size, texture, colour, shape in filter(any, objects):
        item = SceneObject(
            colour=Colour(known[colour]),
            shape=Shape(known[shape]),
            size=None if size is None else Size(known[size]),
            texture=Texture.SOLID if texture is None else Texture(known[texture]),
        )
        items += [item] * counts[count]
    return Scene(
        objects=tuple(items),
        relation=None if relation is None else Relation(known[relation]),
        background=Colour(known[ground]),
    )


def all_scenes() -> Iterator[Scene]:
    """Every scene that `shapes.scene` can draw, unshifted, held-out pairs included."""
    for (colour, shape), size, background in itertools.product(ALL_PAIRS, Size, Colour):
        if colour is not background:
            item = SceneObject(colour=colour, shape=shape, size=size)
            yield Scene(objects=(item,), background=background)
    for first, second in itertools.permutations(ALL_PAIRS, 2):
        pair = tuple(SceneObject(colour=colour, shape=shape) for colour, shape in (first, second))
        for relation, background in itertools.product(Relation, Colour):
            if background not in (first[0], second[0]):
                yield Scene(objects=pair, relation=relation, background=background)


def all_captions() -> Iterator[str]:
    """Every caption of those scenes, English and then Chinese, scene by scene."""
    for item in all_scenes():
        yield item.caption
        yield item.caption_zh


def words() -> tuple[str, ...]:
    """Every English word and every Chinese character (and mark) of all captions, sorted, each once."""
    english = {word for kind in _KINDS for name in _names(kind) for word in name.split()}
    english |= {"on", "background", *_COUNTS}
    english |= {"circles", "squares", "triangles", "crosses", "stars"}
    chinese = set("背景上有个的，在").union(*(_names(kind, zh=True) for kind in _KINDS), _COUNTS_ZH)
    return tuple(sorted(english | {character for word in chinese for character in word}))
