"""Scenes of more kinds than `shapes.scene` draws: the richer world of the embedded captioned data.

A lone object, a pair whose objects may have sizes, or two to four equal objects; any large object may be striped or
hollow. A scene is a pure function of (split, index, kind, jitter), as there.
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np

from imagen_jax.data.shapes import (
    HELD_OUT,
    NUMBERS,
    PAIR_JITTER_ACROSS,
    PAIR_JITTER_ALONG,
    SINGLE_JITTER,
    SLOT,
    SLOTS,
    Colour,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
    Split,
    Texture,
    choose,
    choose_kind,
    choose_two_kinds,
    scene_generator,
)


class Kind(enum.Enum):
    """What a scene has by the word on the command line."""

    LONE = "1"
    PAIR = "2"
    EQUAL = "equal"


class Jitter(enum.Enum):
    """How far objects may be from their nominal places, by the word on the command line."""

    NARROW = "narrow"  # as in `shapes.scene`
    WIDE = "wide"  # anywhere in the picture, apart from one another, their relation clear


_KINDS = {Kind.LONE: 0.35, Kind.PAIR: 0.4, Kind.EQUAL: 0.25}  # shares of the scenes
_TEXTURES = {Texture.SOLID: 0.6, Texture.STRIPED: 0.2, Texture.HOLLOW: 0.2}  # of objects that may have one
_PAIR_SIZES = (None, None, Size.SMALL, Size.LARGE)
_SLOT_JITTER = 0.015

# Of any shape of radius 1: how far it reaches to either side, up and down; and how wide and high it is at most.
_REACH = np.array([1.5, 1.57])
_EXTENT = np.array([2.9, 2.8])
_MARGIN = 0.015  # to the picture's edge and between objects, in sides
_CLEAR = 2.0  # the distance along a relation over that across it, at least
_TRIES = 2000

_VALUES: dict[str, type[enum.Enum]] = {"shape": Shape, "colour": Colour, "size": Size, "texture": Texture}
FAMILY = 4  # scenes of a family, see `sibling_scene`


def world_scene(
    index: int, *, split: str = "train", kind: Kind | None = None, jitter: Jitter = Jitter.NARROW
) -> Scene:
    """The scene number `index` of a split.

    Args:
        index: 0 or more; there is no end.
        split: as for `shapes.scene`: some (colour, shape) pairs occur in `test` only, and there in every scene.
        kind: of the scene; None for all kinds.
        jitter: how freely the objects lie.

    Raises:
        ValueError: A negative index, another split.
    """
    random = scene_generator(index, split, series=1)
    if kind is None:
        kind = tuple(_KINDS)[int(random.choice(len(_KINDS), p=list(_KINDS.values())))]
    match kind:
        case Kind.LONE:
            scene = _equal(random, Split(split), 1)
        case Kind.PAIR:
            scene = _pair(random, Split(split))
        case Kind.EQUAL:
            scene = _equal(random, Split(split), choose(random, tuple(NUMBERS)))
    return _placed(random, scene, jitter)


def sibling_scene(
    index: int, *, split: str = "train", kind: Kind | None = None, jitter: Jitter = Jitter.NARROW
) -> Scene:
    """Scene number `index` of families that differ in one thing, for whoever is to learn what a caption says.

    The first of a family's four is the scene `index // 4` of `world_scene`. The others have another shape, colour,
    size, texture, number or relation, or two objects that have exchanged one of those or their places.

    Args:
        index: 0 or more; there is no end.
        split: as for `world_scene`; in `train`, no object of a held-out pair comes of a change.
        kind: of the family's first scene; None for all kinds.
        jitter: how freely the objects lie.

    Raises:
        ValueError: A negative index, another split.
    """
    family, number = divmod(index, FAMILY)
    scene = world_scene(family, split=split, kind=kind, jitter=jitter)
    if number == 0:
        return scene
    changes = _changes(scene, Split(split))
    order = scene_generator(family, split, series=2).permutation(len(changes))
    random = scene_generator(index, split, series=3)
    return _placed(random, choose(random, changes[order[(number - 1) % len(order)]]), jitter)


def short_captions(scene: Scene, index: int, *, split: str = "train") -> tuple[str, str]:
    """English and Chinese, half of them whole; the others leave out the background, sizes or textures, or all of it.

    Args:
        scene: what is described.
        index: its number; decides what is left out.
        split: it is of.
    """
    random = scene_generator(index, split, series=4)
    if random.random() < 0.5:
        return scene.caption, scene.caption_zh
    background, sizes, textures = (bool(random.random() < share) for share in (0.3, 0.4, 0.7))
    english = scene.brief(sizes=sizes, textures=textures)
    chinese = scene.brief_zh(sizes=sizes, textures=textures)
    if background:
        english = f"{english}{scene.caption[len(scene.brief()) :]}"
        chinese = f"{scene.caption_zh.removesuffix(scene.brief_zh())}{chinese}"
    return english, chinese


def _placed(random: np.random.Generator, scene: Scene, jitter: Jitter) -> Scene:
    """The scene with its objects at random places."""
    centres = _wide(random, scene) if jitter is Jitter.WIDE else _narrow(random, scene)
    nominal = scene.nominal_placements()
    items = tuple(
        dataclasses.replace(item, offset=(float(x) - at[0], float(y) - at[1]))
        for item, (x, y), at in zip(scene.objects, centres, nominal)
    )
    return dataclasses.replace(scene, objects=items)


def _changes(scene: Scene, split: Split) -> list[tuple[Scene, ...]]:
    """The scenes that differ from this one in one thing, by what it is."""
    changes = []
    for candidates in _candidates(scene):
        possible = []
        for relation, items in candidates:
            try:
                changed = Scene(objects=items, relation=relation, background=scene.background)
            except ValueError:
                continue
            known = split is Split.TEST or not any((item.colour, item.shape) in HELD_OUT for item in items)
            if (
                changed != scene
                and known
                and all(
                    item.texture is Texture.SOLID or _can_be_textured(item.size, len(items) == 1)
                    for item in items
                )
            ):
                possible.append(changed)
        if possible:
            changes.append(tuple(possible))
    return changes


def _candidates(scene: Scene) -> Iterator[list[tuple[Relation | None, tuple[SceneObject, ...]]]]:
    """What the objects and their relation could be instead, by what is changed; not all of it can be drawn."""
    items, relation = scene.objects, scene.relation
    for name, values in _VALUES.items():
        if relation is None:
            yield [(None, (_with(items[0], name, value),) * len(items)) for value in values]
        else:
            first, second = items
            changed = [(_with(first, name, value), second) for value in values]
            changed += [(first, _with(second, name, value)) for value in values]
            yield [(relation, pair) for pair in changed]
            pair = _with(first, name, getattr(second, name)), _with(second, name, getattr(first, name))
            yield [(relation, pair)]
    if relation is None:
        yield [(None, items[:1] * number) for number in (1, *NUMBERS)]
    else:
        yield [(relation, items[::-1])]
        yield [(other, items) for other in Relation]


def _with(item: SceneObject, name: str, value: enum.Enum | None) -> SceneObject:
    """The object with another colour, shape, size or texture."""
    changes: dict[str, Any] = {name: value}
    return dataclasses.replace(item, **changes)


def _can_be_textured(size: Size | None, alone: bool) -> bool:
    """Whether an object is large enough for stripes."""
    return alone or size is not Size.SMALL


def _object(
    random: np.random.Generator, kind: tuple[Colour, Shape], size: Size | None, alone: bool
) -> SceneObject:
    texture = Texture.SOLID
    if _can_be_textured(size, alone):
        texture = tuple(_TEXTURES)[int(random.choice(len(_TEXTURES), p=list(_TEXTURES.values())))]
    return SceneObject(colour=kind[0], shape=kind[1], size=size, texture=texture)


def _background(random: np.random.Generator, items: tuple[SceneObject, ...]) -> Colour:
    taken = {item.colour for item in items}
    return choose(random, tuple(colour for colour in Colour if colour not in taken))


def _equal(random: np.random.Generator, split: Split, count: int) -> Scene:
    item = _object(random, choose_kind(random, split), choose(random, tuple(Size)), count == 1)
    return Scene(objects=(item,) * count, background=_background(random, (item,)))


def _pair(random: np.random.Generator, split: Split) -> Scene:
    kinds = choose_two_kinds(random, split)
    items = tuple(_object(random, kind, choose(random, _PAIR_SIZES), False) for kind in kinds)
    relation = choose(random, tuple(Relation))
    return Scene(objects=items, relation=relation, background=_background(random, items))


# --- places --------------------------------------------------------------------------------------------


def _narrow(random: np.random.Generator, scene: Scene) -> np.ndarray:
    """Centres near the nominal ones, (objects, 2), x and y in sides."""
    nominal = np.array([place[:2] for place in scene.nominal_placements()])
    if scene.relation is not None:
        limits = np.array([PAIR_JITTER_ALONG, PAIR_JITTER_ACROSS])
        limits = limits if scene.relation.direction[0] else limits[::-1]
        return nominal + random.uniform(-1.0, 1.0, nominal.shape) * limits
    if len(nominal) == 1:
        return nominal + random.uniform(-SINGLE_JITTER, SINGLE_JITTER, (1, 2))
    quarters = random.permutation(len(SLOTS))[: len(nominal)]
    places = 0.5 + SLOT * np.array(SLOTS)[quarters]
    return places + random.uniform(-_SLOT_JITTER, _SLOT_JITTER, nominal.shape)


def _wide(random: np.random.Generator, scene: Scene) -> np.ndarray:
    """Centres anywhere, (objects, 2): the first of some tries in which nothing touches and the relation is clear."""
    radii = np.array([radius for *_, radius in scene.nominal_placements()])[:, None]
    low = radii * _REACH + _MARGIN
    tries = random.uniform(low, 1.0 - low, (_TRIES, len(radii), 2))
    fine = np.ones(_TRIES, bool)
    for i in range(len(radii)):
        for j in range(i):
            apart = np.abs(tries[:, i] - tries[:, j])
            room = (radii[i] + radii[j]) / 2 * _EXTENT + _MARGIN
            fine &= (apart >= room).any(-1)
    if scene.relation is not None:
        step = np.array(scene.relation.direction)
        between = tries[:, 0] - tries[:, 1]
        along, across = (between * step).sum(-1), np.abs(between[:, int(step[1] == 0)])
        fine &= along >= _CLEAR * across
    found = np.flatnonzero(fine)
    return tries[found[0]] if len(found) else _narrow(random, scene)
