"""The embedded captioned data: coloured shapes, drawn on demand at any resolution.

A scene is a pure function of (split, index); a picture is a pure function of (scene, resolution). One
object: "a small red circle on a blue background". Two objects and how they stand to each other: "a green
square left of a yellow cross on a white background". Some (colour, shape) pairs never occur in training,
so that the `test` split asks for combinations that no training picture showed. `shapes_world` draws scenes of
more kinds: several equal objects, textures, sizes within pairs, objects anywhere.

Lengths are fractions of the picture's side, x to the right and y down, the picture being the unit square.
"""

import dataclasses
import enum
import itertools
from typing import TypeVar

import numpy as np

MIN_RESOLUTION = 16  # pixels; below it the shapes cannot be told apart
MAX_RESOLUTION = 1024  # pixels

SINGLE_FRACTION = 0.7  # the share of one-object scenes where both kinds are mixed
SINGLE_JITTER = 0.03  # largest offset of a lone object from the picture's centre, in x and in y
PAIR_DISTANCE = 0.48  # between the nominal centres of the two objects of a pair
PAIR_RADIUS = 0.145  # of an object of a pair without a size (see `Size.radius`)
MOST_OBJECTS = 4
SLOT = 0.23  # of several equal objects: from the picture's centre to their nominal centres, in x and in y
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
    """The size of an object by its English name; in company both sizes are smaller."""

    SMALL = "small"
    LARGE = "large"

    @property
    def radius(self) -> float:
        """The radius of the circle of the same area, as a fraction of the picture's side."""
        return _RADIUS[self]

    @property
    def company_radius(self) -> float:
        """The same for one of several objects."""
        return _COMPANY_RADIUS[self]

    @property
    def zh(self) -> str:
        """The Chinese adjective."""
        return _ZH[self]


class Texture(enum.Enum):
    """What an object's inside is like by its English name; captions do not say "solid"."""

    SOLID = "solid"
    STRIPED = "striped"  # an outline and level stripes, the background between them
    HOLLOW = "hollow"  # an outline, the background inside

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
_COMPANY_RADIUS = {Size.SMALL: 0.1, Size.LARGE: PAIR_RADIUS}

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
    **dict(zip(Texture, ("实心", "条纹", "空心"), strict=True)),
    **dict(zip(Relation, ("左边", "右边", "上方", "下方"), strict=True)),
}

NUMBERS = {2: "two", 3: "three", 4: "four"}
NUMBERS_ZH = {1: "一", 2: "两", 3: "三", 4: "四"}
SLOTS = ((-1, -1), (1, 1), (1, -1), (-1, 1))  # quarters of the picture that equal objects take, (x, y)

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

ALL_PAIRS = tuple(itertools.product(Colour, Shape))
_HELD_OUT = tuple(pair for pair in ALL_PAIRS if pair in HELD_OUT)
_TRAINED = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One coloured shape. Equality is that of what a caption can say: the offset does not count."""

    colour: Colour
    shape: Shape
    size: Size | None = None  # None where the caption names none: PAIR_RADIUS
    texture: Texture = Texture.SOLID
    offset: tuple[float, float] = dataclasses.field(default=(0.0, 0.0), compare=False)  # x, y, in sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: one object, two in a relation, or up to four equal ones, and the background.

    Two scenes are equal when their captions are: the offsets of the objects do not count.

    Raises:
        ValueError: The objects, their sizes and the relation contradict each other, an object has the
            background's colour, or the two objects of a pair are alike.
    """

    objects: tuple[SceneObject, ...]  # with a relation two: the first stands in it to the second
    relation: Relation | None = None  # None: one object, or equal ones
    background: Colour

    def __post_init__(self):
        if not 1 <= len(self.objects) <= MOST_OBJECTS:
            raise ValueError(f"a scene has 1 to {MOST_OBJECTS} objects, not {len(self.objects)}")
        pair, first = self.relation is not None, self.objects[0]
        if pair and len(self.objects) != 2:
            raise ValueError(f"{len(self.objects)} object(s) do not go with relation={self.relation}")
        if not pair and any(item != first for item in self.objects):
            raise ValueError("objects without a relation are all alike")
        if not pair and first.size is None:
            raise ValueError("a lone object and equal ones have a size")
        if any(item.colour is self.background for item in self.objects):
            raise ValueError(f"an object has the background's colour, {self.background.value}")
        if pair and len({(item.colour, item.shape) for item in self.objects}) == 1:
            raise ValueError("the two objects of a pair differ in colour or shape")

    @property
    def caption(self) -> str:
        """The English caption."""
        return f"{self.brief()} on {_article(self.background.value)} background"

    @property
    def caption_zh(self) -> str:
        """The Chinese caption."""
        return f"{self.background.zh}背景上{'有' if self.relation is None else '，'}{self.brief_zh()}"

    def brief(self, *, sizes: bool = True, textures: bool = True) -> str:
        """The English caption without the background, nor what else is not to be said."""
        first, *_, last = (_said(item, sizes, textures) for item in (*self.objects, *self.objects[-1:]))
        if self.relation is None:
            return _english(first, len(self.objects))
        return f"{_english(first)} {self.relation.value} {_english(last)}"

    def brief_zh(self, *, sizes: bool = True, textures: bool = True) -> str:
        """The same in Chinese."""
        first, *_, last = (_said(item, sizes, textures) for item in (*self.objects, *self.objects[-1:]))
        if self.relation is None:
            return _chinese(first, len(self.objects))
        return f"{_chinese(first)}在{_chinese(last)}的{self.relation.zh}"

    def placements(self) -> tuple[tuple[float, float, float], ...]:
        """The centre (x, y) and the radius of each object, as fractions of the picture's side."""
        return tuple(
            (x + item.offset[0], y + item.offset[1], radius)
            for item, (x, y, radius) in zip(self.objects, self.nominal_placements())
        )

    def nominal_placements(self) -> tuple[tuple[float, float, float], ...]:
        """The same of the objects unshifted."""
        if len(self.objects) == 1:
            (item,) = self.objects
            assert item.size is not None  # by construction
            return ((0.5, 0.5, item.size.radius),)
        radii = [PAIR_RADIUS if item.size is None else item.size.company_radius for item in self.objects]
        if self.relation is None:
            return tuple((0.5 + SLOT * x, 0.5 + SLOT * y, radius) for (x, y), radius in zip(SLOTS, radii))
        dx, dy = (PAIR_DISTANCE / 2 * step for step in self.relation.direction)
        return tuple((0.5 + sign * dx, 0.5 + sign * dy, radius) for sign, radius in zip((1, -1), radii))


def _said(item: SceneObject, size: bool, texture: bool) -> SceneObject:
    """The object as a caption has it that leaves out its size or texture."""
    return dataclasses.replace(
        item, size=item.size if size else None, texture=item.texture if texture else Texture.SOLID
    )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _english(item: SceneObject, count: int = 1) -> str:
    size = "" if item.size is None else f"{item.size.value} "
    texture = "" if item.texture is Texture.SOLID else f"{item.texture.value} "
    name = f"{size}{texture}{item.colour.value} {item.shape.value}"
    if count == 1:
        return _article(name)
    return f"{NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"


def _chinese(item: SceneObject, count: int = 1) -> str:
    size = "" if item.size is None else f"{item.size.zh}的"
    texture = "" if item.texture is Texture.SOLID else item.texture.zh
    return f"{NUMBERS_ZH[count]}个{size}{texture}{item.colour.zh}{item.shape.zh}"


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
    if objects not in (None, 1, 2):
        raise ValueError(f"objects={objects}: scenes have 1 or 2 objects (None: both kinds)")
    random = scene_generator(index, split)
    single = bool(random.random() < SINGLE_FRACTION) if objects is None else objects == 1
    return _single(random, Split(split)) if single else _pair(random, Split(split))


def scene_generator(index: int, split: str, series: int = 0) -> np.random.Generator:
    """What draws scene number `index` of a split.

    Args:
        index: 0 or more.
        split: its name.
        series: 0 for the scenes of `scene`, 1 for those of `shapes_world`.

    Raises:
        ValueError: A negative index, another split.
    """
    if not 0 <= index < 2**64:
        raise ValueError(f"index={index}: scenes are numbered from 0 to 2**64 - 1")
    names = [kind.value for kind in Split]
    if split not in names:
        raise ValueError(f"split={split!r}: the embedded data has the splits {', '.join(names)}")
    key = np.array([names.index(split) + len(names) * series, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def choose_kind(random: np.random.Generator, split: Split) -> tuple[Colour, Shape]:
    """Colour and shape of one object of a split."""
    return choose(random, _TRAINED if split is Split.TRAIN else _HELD_OUT)


def choose_two_kinds(
    random: np.random.Generator, split: Split
) -> tuple[tuple[Colour, Shape], tuple[Colour, Shape]]:
    """Colours and shapes of a pair of a split: of two trained ones, or one is held out."""
    if split is Split.TRAIN:
        first = choose(random, _TRAINED)
        return first, choose(random, tuple(pair for pair in _TRAINED if pair != first))
    first = choose(random, _HELD_OUT)
    second = choose(random, tuple(pair for pair in ALL_PAIRS if pair != first))
    return (second, first) if random.random() < 0.5 else (first, second)


def _single(random: np.random.Generator, split: Split) -> Scene:
    colour, shape = choose_kind(random, split)
    size = choose(random, tuple(Size))
    background = choose(random, tuple(other for other in Colour if other is not colour))
    x, y = random.uniform(-SINGLE_JITTER, SINGLE_JITTER, 2)
    item = SceneObject(colour=colour, shape=shape, size=size, offset=(float(x), float(y)))
    return Scene(objects=(item,), background=background)


def _pair(random: np.random.Generator, split: Split) -> Scene:
    first, second = choose_two_kinds(random, split)
    relation = choose(random, tuple(Relation))
    background = choose(random, tuple(c for c in Colour if c not in (first[0], second[0])))
    horizontal = relation in (Relation.LEFT_OF, Relation.RIGHT_OF)
    limits = (PAIR_JITTER_ALONG, PAIR_JITTER_ACROSS)
    limits = limits if horizontal else limits[::-1]
    items = []
    for colour, shape in (first, second):
        x, y = random.uniform(-1.0, 1.0, 2) * limits
        items.append(SceneObject(colour=colour, shape=shape, offset=(float(x), float(y))))
    return Scene(objects=tuple(items), relation=relation, background=background)


def choose(random: np.random.Generator, options: tuple[_T, ...]) -> _T:
    """One of them, all alike likely."""
    return options[int(random.integers(len(options)))]
