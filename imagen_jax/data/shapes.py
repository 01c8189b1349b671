"""The embedded captioned data: coloured shapes, drawn on demand at any resolution.

A scene is a pure function of (split, index); a picture is a pure function of (scene, resolution). One
object: "a small red circle on a blue background". Two objects and how they stand to each other: "a green
square left of a yellow cross on a white background". Some (colour, shape) pairs never occur in training,
so that the `test` split asks for combinations that no training picture showed.

Lengths are fractions of the picture's side, x to the right and y down, the picture being the unit square.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

MIN_RESOLUTION = 16  # pixels; below it the shapes cannot be told apart
MAX_RESOLUTION = 1024  # pixels

SINGLE_FRACTION = 0.7  # the share of one-object scenes where both kinds are mixed
SINGLE_JITTER = 0.03  # largest offset of a lone object from the picture's centre, in x and in y
PAIR_DISTANCE = 0.48  # between the nominal centres of the two objects of a pair
PAIR_RADIUS = 0.145  # of both objects of a pair (see `Size.radius`)
PAIR_JITTER_ALONG = 0.01  # largest offset along the line through both objects
PAIR_JITTER_ACROSS = 0.03  # largest offset across that line


class Colour(enum.Enum):
    """A colour by its English name; any two are at least 115 apart in 8-bit RGB."""

    RED = "red"
    GREEN = "green"
    BLUE = "blue"
    YELLOW = "yellow"
    WHITE = "white"
    BLACK = "black"
    PURPLE = "purple"
    ORANGE = "orange"

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue, each 0 to 255."""
        return _RGB[self]

    @property
    def zh(self) -> str:
        """The Chinese name."""
        return _ZH[self]


class Shape(enum.Enum):
    """A shape by its English name. All shapes of one size cover the same area."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    CROSS = "cross"
    STAR = "star"

    @property
    def zh(self) -> str:
        """The Chinese name."""
        return _ZH[self]


class Size(enum.Enum):
    """The size of a lone object by its English name; the objects of a pair have no size in the caption."""

    SMALL = "small"
    LARGE = "large"

    @property
    def radius(self) -> float:
        """The radius of the circle of the same area, as a fraction of the picture's side."""
        return _RADIUS[self]

    @property
    def zh(self) -> str:
        """The Chinese adjective."""
        return _ZH[self]


class Relation(enum.Enum):
    """Where the first object of a pair stands, seen from the second."""

    LEFT_OF = "left of"
    RIGHT_OF = "right of"
    ABOVE = "above"
    BELOW = "below"

    @property
    def direction(self) -> tuple[int, int]:
        """The unit step (x, y) from the second object to the first; y grows downwards."""
        return _DIRECTION[self]

    @property
    def zh(self) -> str:
        """The Chinese expression."""
        return _ZH[self]


class Split(enum.Enum):
    """A split by its name; the value is also the word on the command line."""

    TRAIN = "train"
    TEST = "test"


_RGB = {
    Colour.RED: (205, 20, 40),
    Colour.GREEN: (20, 145, 65),
    Colour.BLUE: (25, 80, 225),
    Colour.YELLOW: (255, 235, 60),
    Colour.WHITE: (250, 250, 250),
    Colour.BLACK: (15, 15, 15),
    Colour.PURPLE: (140, 40, 180),
    Colour.ORANGE: (250, 130, 10),
}

_RADIUS = {Size.SMALL: 0.17, Size.LARGE: 0.285}

_DIRECTION = {
    Relation.LEFT_OF: (-1, 0),
    Relation.RIGHT_OF: (1, 0),
    Relation.ABOVE: (0, -1),
    Relation.BELOW: (0, 1),
}

_ZH: dict[enum.Enum, str] = {
    **dict(zip(Colour, ("红色", "绿色", "蓝色", "黄色", "白色", "黑色", "紫色", "橙色"), strict=True)),
    **dict(zip(Shape, ("圆形", "正方形", "三角形", "十字形", "五角星"), strict=True)),
    **dict(zip(Size, ("小", "大"), strict=True)),
    **dict(zip(Relation, ("左边", "右边", "上方", "下方"), strict=True)),
}

# Seven of the forty pairs (17.5 %): no colour and no shape loses more than two of its partners.
HELD_OUT: frozenset[tuple[Colour, Shape]] = frozenset(
    {
        (Colour.RED, Shape.STAR),
        (Colour.GREEN, Shape.CIRCLE),
        (Colour.BLUE, Shape.TRIANGLE),
        (Colour.YELLOW, Shape.CROSS),
        (Colour.WHITE, Shape.SQUARE),
        (Colour.PURPLE, Shape.CIRCLE),
        (Colour.ORANGE, Shape.SQUARE),
    }
)

_T = TypeVar("_T")

_ALL_PAIRS = tuple(itertools.product(Colour, Shape))
_HELD_OUT = tuple(pair for pair in _ALL_PAIRS if pair in HELD_OUT)
_TRAINED = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One coloured shape. Equality is that of what a caption can say: the offset does not count."""

    colour: Colour
    shape: Shape
    size: Size | None = None  # None for the objects of a pair, whose size is fixed and not in the caption
    offset: tuple[float, float] = dataclasses.field(default=(0.0, 0.0), compare=False)  # x, y, in sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: one object with a size, or two objects with a relation, and the background.

    Two scenes are equal when their captions are: the offsets of the objects do not count.

    Raises:
        ValueError: The objects, their sizes and the relation contradict each other, an object has the
            background's colour, or the two objects of a pair are alike.
    """

    objects: tuple[SceneObject, ...]  # one, or two: the first stands in `relation` to the second
    relation: Relation | None = None  # None for one object
    background: Colour

    def __post_init__(self):
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one or two objects, not {len(self.objects)}")
        pair = len(self.objects) == 2
        if pair != (self.relation is not None):
            raise ValueError(f"{len(self.objects)} object(s) do not go with relation={self.relation}")
        if any((item.size is None) != pair for item in self.objects):
            raise ValueError("a lone object has a size, the objects of a pair have none")
        if any(item.colour is self.background for item in self.objects):
            raise ValueError(f"an object has the background's colour, {self.background.value}")
        if pair and self.objects[0] == self.objects[1]:
            raise ValueError("the two objects of a pair differ in colour or shape")

    @property
    def caption(self) -> str:
        """The English caption."""
        names = [_english(item) for item in self.objects]
        what = names[0] if self.relation is None else f"{names[0]} {self.relation.value} {names[1]}"
        return f"{what} on {_article(self.background.value)} background"

    @property
    def caption_zh(self) -> str:
        """The Chinese caption."""
        names = [_chinese(item) for item in self.objects]
        if self.relation is None:
            return f"{self.background.zh}背景上有{names[0]}"
        return f"{self.background.zh}背景上，{names[0]}在{names[1]}的{self.relation.zh}"

    def placements(self) -> tuple[tuple[float, float, float], ...]:
        """The centre (x, y) and the radius of each object, as fractions of the picture's side."""
        if self.relation is None:
            (item,) = self.objects
            assert item.size is not None  # by construction
            return ((0.5 + item.offset[0], 0.5 + item.offset[1], item.size.radius),)
        dx, dy = (PAIR_DISTANCE / 2 * step for step in self.relation.direction)
        return tuple(
            (0.5 + sign * dx + item.offset[0], 0.5 + sign * dy + item.offset[1], PAIR_RADIUS)
            for sign, item in zip((1, -1), self.objects)
        )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _english(item: SceneObject) -> str:
    name = f"{item.colour.value} {item.shape.value}"
    return _article(name if item.size is None else f"{item.size.value} {name}")


def _chinese(item: SceneObject) -> str:
    size = "" if item.size is None else f"{item.size.zh}的"
    return f"一个{size}{item.colour.zh}{item.shape.zh}"


def scene(index: int, *, split: str = "train", objects: int | None = None) -> Scene:
    """The scene number `index` of a split: the same on every machine, whatever was drawn before.

    Args:
        index: 0 or more; there is no end.
        split: `train`: no object of a held-out (colour, shape) pair. `test`: a lone object is of a held-out
            pair, of two objects at least one is.
        objects: 1 or 2 for scenes of that many objects only; None for about 70 % of one object.

    Raises:
        ValueError: A negative index, another split, another number of objects.
    """
    if not 0 <= index < 2**64:
        raise ValueError(f"index={index}: scenes are numbered from 0 to 2**64 - 1")
    kinds = tuple(Split)
    names = [kind.value for kind in kinds]
    if split not in names:
        raise ValueError(f"split={split!r}: the embedded data has the splits {', '.join(names)}")
    if objects not in (None, 1, 2):
        raise ValueError(f"objects={objects}: scenes have 1 or 2 objects (None: both kinds)")
    key = np.array([names.index(split), index], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    single = bool(random.random() < SINGLE_FRACTION) if objects is None else objects == 1
    return _single(random, Split(split)) if single else _pair(random, Split(split))


def _single(random: np.random.Generator, split: Split) -> Scene:
    colour, shape = _choose(random, _TRAINED if split is Split.TRAIN else _HELD_OUT)
    size = _choose(random, tuple(Size))
    background = _choose(random, tuple(other for other in Colour if other is not colour))
    x, y = random.uniform(-SINGLE_JITTER, SINGLE_JITTER, 2)
    item = SceneObject(colour=colour, shape=shape, size=size, offset=(float(x), float(y)))
    return Scene(objects=(item,), background=background)


def _pair(random: np.random.Generator, split: Split) -> Scene:
    if split is Split.TRAIN:
        first = _choose(random, _TRAINED)
        second = _choose(random, tuple(pair for pair in _TRAINED if pair != first))
    else:
        first = _choose(random, _HELD_OUT)
        second = _choose(random, tuple(pair for pair in _ALL_PAIRS if pair != first))
        if random.random() < 0.5:
            first, second = second, first
    relation = _choose(random, tuple(Relation))
    background = _choose(random, tuple(c for c in Colour if c not in (first[0], second[0])))
    horizontal = relation in (Relation.LEFT_OF, Relation.RIGHT_OF)
    limits = (PAIR_JITTER_ALONG, PAIR_JITTER_ACROSS)
    limits = limits if horizontal else limits[::-1]
    items = []
    for colour, shape in (first, second):
        x, y = random.uniform(-1.0, 1.0, 2) * limits
        items.append(SceneObject(colour=colour, shape=shape, offset=(float(x), float(y))))
    return Scene(objects=tuple(items), relation=relation, background=background)


def _choose(random: np.random.Generator, options: tuple[_T, ...]) -> _T:
    return options[int(random.integers(len(options)))]


# --- captions ----------------------------------------------------------------------------------------


def _one_of(kind: type[enum.Enum], *, zh: bool = False) -> str:
    return "(" + "|".join(_ZH[item] if zh else item.value for item in kind) + ")"


_NOUN = f"{_one_of(Colour)} {_one_of(Shape)}"
_NOUN_ZH = f"{_one_of(Colour, zh=True)}{_one_of(Shape, zh=True)}"
_GROUND = f"on an? {_one_of(Colour)} background"
_GROUND_ZH = f"{_one_of(Colour, zh=True)}背景上"

_SINGLE_EN = re.compile(f"an? {_one_of(Size)} {_NOUN} {_GROUND}")
_PAIR_EN = re.compile(f"an? {_NOUN} {_one_of(Relation)} an? {_NOUN} {_GROUND}")
_SINGLE_ZH = re.compile(f"{_GROUND_ZH}有一个{_one_of(Size, zh=True)}的{_NOUN_ZH}")
_PAIR_ZH = re.compile(f"{_GROUND_ZH}，一个{_NOUN_ZH}在一个{_NOUN_ZH}的{_one_of(Relation, zh=True)}")

_KINDS: tuple[type[enum.Enum], ...] = (Colour, Shape, Size, Relation)
_BY_WORD: dict[str, enum.Enum] = {item.value: item for kind in _KINDS for item in kind}
_BY_WORD.update({word: item for item, word in _ZH.items()})


def parse(caption: str) -> Scene:
    """Reads an English or Chinese caption back: the scene it describes, with the objects unshifted.

    Raises:
        ValueError: The caption is not one of this data set's; the message quotes it.
    """
    for pattern in (_SINGLE_EN, _SINGLE_ZH, _PAIR_EN, _PAIR_ZH):
        match = pattern.fullmatch(caption)
        if match is not None:
            break
    else:
        raise ValueError(f"not a caption of the embedded data: {caption!r}")
    found = [_BY_WORD[word] for word in match.groups()]
    colours = [item for item in found if isinstance(item, Colour)]
    shapes = [item for item in found if isinstance(item, Shape)]
    size = next((item for item in found if isinstance(item, Size)), None)
    relation = next((item for item in found if isinstance(item, Relation)), None)
    if pattern in (_SINGLE_ZH, _PAIR_ZH):  # Chinese names the background first
        colours = colours[1:] + colours[:1]
    objects = tuple(SceneObject(colour=c, shape=s, size=size) for c, s in zip(colours, shapes))
    try:
        parsed = Scene(objects=objects, relation=relation, background=colours[-1])
    except ValueError as error:
        raise ValueError(f"not a caption of the embedded data: {caption!r}: {error}") from error
    return parsed


def all_scenes() -> Iterator[Scene]:
    """Every scene that a caption of this data set can describe, unshifted, held-out pairs included."""
    for (colour, shape), size, background in itertools.product(_ALL_PAIRS, Size, Colour):
        if colour is not background:
            item = SceneObject(colour=colour, shape=shape, size=size)
            yield Scene(objects=(item,), background=background)
    for first, second in itertools.permutations(_ALL_PAIRS, 2):
        pair = tuple(SceneObject(colour=colour, shape=shape) for colour, shape in (first, second))
        for relation, background in itertools.product(Relation, Colour):
            if background not in (first[0], second[0]):
                yield Scene(objects=pair, relation=relation, background=background)


def all_captions() -> Iterator[str]:
    """Every caption, English and then Chinese, scene by scene."""
    for item in all_scenes():
        yield item.caption
        yield item.caption_zh


def words() -> tuple[str, ...]:
    """Every English word and every Chinese character (and mark) of the captions, sorted, each once."""
    english = {word for kind in _KINDS for item in kind for word in item.value.split()}
    english |= {"a", "an", "on", "background"}
    chinese = set("背景上有一个的，在").union(*_ZH.values())
    return tuple(sorted(english | chinese))
