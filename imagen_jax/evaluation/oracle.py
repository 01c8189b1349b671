"""Reads a picture of the embedded data back, and says which parts of a caption it fulfils.

No network and nothing learned: the background is the median of the picture's rim; an object is a connected
region that differs from it; its shape is the best match, by soft intersection over union, among the shapes
drawn at its own size and pixel grid. Every attribute is judged by itself and is None where the picture gives
no clear answer: noise, blobs, half shapes and blends of shapes have no shape.

Striped and hollow objects are read by their filled outline, and their inside is compared with the textures of that
shape at that place; this is done where a caption asks for a texture, so that an object that has one is nowhere taken
for a solid one.

It forgives what a generated picture may well have (colours off by 25 of 255, light noise, edges blurred by
half a pixel, sizes off by a tenth) and is strict on the outline.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from scipy import ndimage

from imagen_jax.data import shapes_captions, shapes_render
from imagen_jax.data.shapes import Colour, Relation, SceneObject, Shape, Size, Texture

MIN_RESOLUTION = 32  # pixels; smaller pictures are not read
_WORKING = 64  # pixels; larger pictures are averaged down to this side first

# Colours: Euclidean distances in 8-bit RGB; the nearest two named colours are 116 apart.
_SAME_COLOUR = 56.0  # a colour this near to a named one carries its name
_FOREGROUND = 38.0  # a pixel this far from the background belongs to an object
_EVEN_RIM = 0.85  # the share of the rim's pixels that must be near their median colour
_EVEN_OBJECT = 0.65  # the same for an object's inner pixels; in a small star many lie on the blurred edge

# Areas and radii as fractions of the picture (see `shapes.Size.radius`).
_SPECK = 0.012  # a smaller region is dirt, not an object; a pair's object covers 0.066
_SIZES = {Size.SMALL: (0.14, 0.206), Size.LARGE: (0.236, 0.34)}
_COMPANY_SIZES = {Size.SMALL: (0.082, 0.119), Size.LARGE: (0.121, 0.175)}

# Shapes: bounds between what uneven, noisy and blurred drawings reach and what impostors reach. Both depend
# on the object's radius in pixels, as a pixel of outline weighs less in a larger object: (radius, bound).
_UNEVEN = ((5.0, 0.034), (18.0, 0.020))  # how far, on average, an outline may lie off the shape's, in radii
_TEXTURE_ERROR = (
    0.15  # how far the cover of an object's inside may be from its texture's, on average of any half
)
_MARGIN = ((5.0, 0.055), (10.0, 0.085))  # the least lead, in intersection over union, over the second shape

# The outline's length in radii. A mean displacement d of an outline of length L costs about d L / π of the
# intersection over union (the area being π), so that one bound on d is equally strict on every shape.
_OUTLINE = {
    Shape.CIRCLE: 6.28,
    Shape.SQUARE: 7.09,
    Shape.TRIANGLE: 8.08,
    Shape.CROSS: 9.55,
    Shape.STAR: 10.23,
}

_DIRECTION_RATIO = 1.5  # the larger of |dx|, |dy| between two objects, over the smaller, for a clear relation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectReading:
    """What can be said of one object in a picture; None is "no clear answer"."""

    colour: Colour | None
    shape: Shape | None
    size: Size | None  # that of a lone object, or of one of several
    texture: Texture | None
    x: float  # centre of area from the left, in sides
    y: float  # centre of area from the top, in sides
    radius: float  # that of the circle of the same area, in sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What can be said of a picture; None is "no clear answer"."""

    background: Colour | None
    objects: tuple[ObjectReading, ...]  # from the left for a pair side by side, else from the top
    relation: Relation | None  # of the first object to the second, where there are exactly two


def read(picture: UInt8[np.ndarray, "r c 3"], *, textures: bool = True) -> Reading:
    """Reads the background, the objects and their relation from a picture.

    Args:
        picture: RGB, 0 to 255, 32 pixels or more a side. Lengths are fractions of its shorter side.
        textures: Whether striped and hollow objects are known; if not they have no shape.

    Raises:
        ValueError: The picture is too small or not 8-bit RGB.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 (rows, columns, 3), not {picture.dtype} {picture.shape}")
    if min(picture.shape[:2]) < MIN_RESOLUTION:
        size = " x ".join(map(str, picture.shape[:2]))
        raise ValueError(f"a picture of {size} pixels cannot be read; {MIN_RESOLUTION} are needed")
    pixels = _reduce(picture)
    ground = _background(pixels)
    if ground is None:
        return Reading(background=None, objects=(), relation=None)
    regions = _regions(np.linalg.norm(pixels - ground, axis=-1))
    bounds = _SIZES if regions.max() == 1 else _COMPANY_SIZES
    objects = []
    for label in range(1, int(regions.max()) + 1):
        item = _object(pixels, ground, regions == label, bounds)
        if textures and item.shape is None:
            item = _textured(pixels, ground, regions == label, bounds) or item
        objects.append(item)
    relation = None
    if len(objects) == 2:
        relation = _relation(objects[0], objects[1])
        if relation in (Relation.RIGHT_OF, Relation.BELOW):
            objects.reverse()
            relation = _relation(objects[0], objects[1])
    return Reading(background=_name(ground), objects=tuple(objects), relation=relation)


def check(picture: UInt8[np.ndarray, "r c 3"], caption: str) -> dict[str, bool]:
    """Says which parts of a caption hold in a picture.

    For a pair, the picture's objects are matched to the caption's by what is said of them; a part holds when it
    does for both, `relation` when it holds between the objects so matched. The number of objects must be the
    caption's, or nothing said of them holds.

    Args:
        picture: RGB, 0 to 255, 32 pixels or more a side.
        caption: English or Chinese, of the embedded data's grammar.

    Returns:
        `background`, `colour`, `shape`; `size` and `texture` where the caption names one; `relation` for a pair,
        `count` for several equal objects.

    Raises:
        ValueError: The picture is too small, or the caption is not of the grammar.
    """
    wanted = shapes_captions.parse(caption)
    seen = read(picture, textures=any(_names_texture(item) for item in wanted.objects))
    complete = len(seen.objects) == len(wanted.objects)
    order, fits = seen.objects, 0
    if complete and wanted.relation is not None:
        both = (seen.objects, seen.objects[::-1])
        agreements = [sum(map(_agreement, objects, wanted.objects)) for objects in both]
        fits = agreements[1] - agreements[0]
        order = both[fits > 0]
    matched = list(zip(order, wanted.objects))
    result = {
        "background": seen.background is wanted.background,
        "colour": complete and all(got.colour is want.colour for got, want in matched),
        "shape": complete and all(got.shape is want.shape for got, want in matched),
    }
    if any(item.size is not None for item in wanted.objects):
        result["size"] = complete and all(want.size in (None, got.size) for got, want in matched)
    if any(map(_names_texture, wanted.objects)):
        result["texture"] = complete and all(got.texture is want.texture for got, want in matched)
    if wanted.relation is not None:
        # On a tie nothing tells which object is which, so the relation is not shown.
        result["relation"] = fits != 0 and _relation(order[0], order[1]) is wanted.relation
    elif len(wanted.objects) > 1:
        result["count"] = complete
    return result


def score(pictures: Iterable[UInt8[np.ndarray, "r c 3"]], captions: Sequence[str]) -> dict[str, float]:
    """Scores pictures against their captions.

    Args:
        pictures: One per caption, in the same order; read one at a time.
        captions: English or Chinese.

    Returns:
        For `background`, `colour`, `shape`, `size`, `texture`, `relation` and `count` the fraction, 0 to 1, of the
        captions with such a part in which it holds (parts that no caption has are left out); `fulfilled`, the
        number of captions of which every part holds; `captions`, the number of captions.

    Raises:
        ValueError: The numbers of pictures and captions differ, or as in `check`.
    """
    held: dict[str, list[bool]] = {}
    whole = 0
    for picture, caption in zip(pictures, captions, strict=True):
        parts = check(picture, caption)
        whole += all(parts.values())
        for name, holds in parts.items():
            held.setdefault(name, []).append(holds)
    fractions = {name: float(np.mean(values)) for name, values in held.items()}
    return fractions | {"fulfilled": whole, "captions": len(captions)}


def _names_texture(item: SceneObject) -> bool:
    return item.texture is not Texture.SOLID


def _agreement(got: ObjectReading, want: SceneObject) -> int:
    """How much of what a caption says of an object holds; colour and shape, which tell a pair's apart, first."""
    told = (got.colour is want.colour) + (got.shape is want.shape)
    more = (want.size is not None and got.size is want.size) + (
        _names_texture(want) and got.texture is want.texture
    )
    return 4 * told + more


def _relation(first: ObjectReading, second: ObjectReading) -> Relation | None:
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < _DIRECTION_RATIO * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return Relation.LEFT_OF if dx < 0 else Relation.RIGHT_OF
    return Relation.ABOVE if dy < 0 else Relation.BELOW


# --- finding objects -----------------------------------------------------------------------------------


def _reduce(picture: UInt8[np.ndarray, "r c 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Averages a picture whose shorter side is larger than the working side down to it, by area."""
    pixels = picture.astype(np.float32)
    short = min(picture.shape[:2])
    if short <= _WORKING:
        return pixels
    rows, columns = (round(_WORKING * side / short) for side in picture.shape[:2])
    return _average(_average(pixels, rows).swapaxes(0, 1), columns).swapaxes(0, 1)


def _average(pixels: Float32[np.ndarray, "r c 3"], count: int) -> Float32[np.ndarray, "w c 3"]:
    """Averages rows down to a number of them, each row counting by the share of it that falls inside."""
    edges = np.linspace(0, len(pixels), count + 1)
    whole = np.minimum(edges.astype(int), len(pixels) - 1)
    sums = np.concatenate([np.zeros_like(pixels[:1]), np.cumsum(pixels, axis=0)])
    part = (edges - whole).astype(np.float32)[:, None, None]
    above = sums[whole] + part * pixels[whole]  # everything above each edge
    return np.diff(above, axis=0) * np.float32(count / len(pixels))


def _background(pixels: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " 3"] | None:
    """The median colour of the rim, or None where the rim is not of one colour."""
    rim = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    colour = np.median(rim, axis=0)
    near = np.linalg.norm(rim - colour, axis=-1) < _SAME_COLOUR
    return colour if near.mean() >= _EVEN_RIM else None


def _name(colour: Float32[np.ndarray, " 3"]) -> Colour | None:
    names = tuple(Colour)
    distances = [float(np.linalg.norm(colour - np.array(name.rgb))) for name in names]
    nearest = int(np.argmin(distances))
    return names[nearest] if distances[nearest] <= _SAME_COLOUR else None


def _regions(distance: Float32[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Labels the objects 1, 2, … from the picture's distance to the background; 0 elsewhere."""
    labels, _ = ndimage.label(distance > _FOREGROUND)
    areas = np.bincount(labels.ravel())
    keep = np.flatnonzero(areas >= _SPECK * min(distance.shape) ** 2)
    renumbered = np.zeros(len(areas), np.int32)
    renumbered[keep[keep > 0]] = np.arange(1, np.count_nonzero(keep) + 1)
    return renumbered[labels]


def _object(
    pixels: Float32[np.ndarray, "h w 3"],
    ground: Float32[np.ndarray, " 3"],
    region: Bool[np.ndarray, "h w"],
    bounds: dict[Size, tuple[float, float]],
) -> ObjectReading:
    """Reads a solid object; one that is not has no shape."""
    inner = ndimage.binary_erosion(region)
    inner = inner if inner.any() else region
    colour = np.median(pixels[inner], axis=0)
    even = (np.linalg.norm(pixels[inner] - colour, axis=-1) < _SAME_COLOUR).mean() >= _EVEN_OBJECT
    cover = _cover(pixels, ground, colour, region)
    place = _place(cover)
    shape = _shape(cover, *place)
    texture = None if shape is None else Texture.SOLID
    return _reading(_name(colour) if even else None, shape, texture, place, min(region.shape), bounds)


def _textured(
    pixels: Float32[np.ndarray, "h w 3"],
    ground: Float32[np.ndarray, " 3"],
    region: Bool[np.ndarray, "h w"],
    bounds: dict[Size, tuple[float, float]],
) -> ObjectReading | None:
    """Reads an object with holes by its outline; None if it has none, or its inside is of no texture."""
    filled = ndimage.binary_fill_holes(region)
    if filled is None or not (filled & ~region).any():
        return None
    distance = np.linalg.norm(pixels - ground, axis=-1)
    # Of thin lines few pixels are wholly covered: the third that is farthest from the background.
    core = region & (distance >= np.quantile(distance[region], 2 / 3))
    colour = np.median(pixels[core], axis=0)
    cover = _cover(pixels, ground, colour, filled)
    silhouette = np.where(ndimage.binary_erosion(filled), 1.0, cover).astype(np.float32)
    place = _place(silhouette)
    shape = _shape(silhouette, *place)
    texture = None if shape is None else _texture(cover, silhouette, shape, *place)
    if texture is None:
        return None
    return _reading(_name(colour), shape, texture, place, min(region.shape), bounds)


def _reading(
    colour: Colour | None,
    shape: Shape | None,
    texture: Texture | None,
    place: tuple[float, float, float],
    short: int,
    bounds: dict[Size, tuple[float, float]],
) -> ObjectReading:
    """An object at (x, y, radius) in pixels of a picture whose shorter side has `short` of them."""
    x, y, radius = (length / short for length in place)
    size = _size(radius, bounds)
    return ObjectReading(colour=colour, shape=shape, size=size, texture=texture, x=x, y=y, radius=radius)


def _cover(
    pixels: Float32[np.ndarray, "h w 3"],
    ground: Float32[np.ndarray, " 3"],
    colour: Float32[np.ndarray, " 3"],
    region: Bool[np.ndarray, "h w"],
) -> Float32[np.ndarray, "h w"]:
    """How much of the object's colour each pixel has: its projection onto the line from background to object."""
    step = colour - ground
    cover = np.clip((pixels - ground) @ step / max(float(step @ step), 1.0), 0.0, 1.0)
    return cover * ndimage.binary_dilation(region, iterations=max(1, min(region.shape) // 32))


def _place(cover: Float32[np.ndarray, "h w"]) -> tuple[float, float, float]:
    """The centre (x, y) of a soft mask and the radius of the circle of its area, in pixels."""
    area = float(cover.sum())
    y, x = (float(cover.sum(1 - axis) @ (np.arange(cover.shape[axis]) + 0.5)) / area for axis in (0, 1))
    return x, y, float(np.sqrt(area / np.pi))


def _size(radius: float, bounds: dict[Size, tuple[float, float]]) -> Size | None:
    return next((size for size, (low, high) in bounds.items() if low <= radius <= high), None)


def _texture(
    cover: Float32[np.ndarray, "h w"],
    silhouette: Float32[np.ndarray, "h w"],
    shape: Shape,
    x: float,
    y: float,
    radius: float,
) -> Texture | None:
    """Striped or hollow: which of them the inside of an object of a known outline is like, in each of its halves."""
    side = max(cover.shape)  # `coverage` draws squares
    right = np.arange(cover.shape[1]) + 0.5 > x
    below = np.arange(cover.shape[0])[:, None] + 0.5 > y
    halves = [silhouette * half for half in (right, ~right, below, ~below)]
    errors: dict[Texture, float] = {}
    for texture in (Texture.STRIPED, Texture.HOLLOW):
        tried = []
        for shift in _SHIFTS:
            place = {"x": x / side, "y": (y + shift * radius) / side, "radius": radius / side}
            drawn = shapes_render.coverage(shape, side, texture=texture, **place)
            drawn = drawn[: cover.shape[0], : cover.shape[1]]
            wrong = np.abs(cover - drawn)
            tried.append(max(float((wrong * half).sum() / half.sum()) for half in halves))
        errors[texture] = min(tried)
    best = min(errors, key=lambda texture: errors[texture])
    return best if errors[best] <= _TEXTURE_ERROR else None


# --- telling shapes apart ------------------------------------------------------------------------------

_GRID = 36  # samples a side of the frame in which masks are compared
_FRAME = 1.75  # half the frame's side, in radii: the star reaches 1.5, the triangle 1.56
_SHIFTS = (-0.05, 0.0, 0.05)  # tried in x and in y, in radii
_SCALES = (0.97, 1.0, 1.03)  # tried radii
_RADIUS_STEP = 1.04  # templates are drawn for radii in this ratio


def _shape(cover: Float32[np.ndarray, "h w"], x: float, y: float, radius: float) -> Shape | None:
    """The shape of a soft mask, given its centre and radius in pixels; None where none fits clearly."""
    scores = shape_scores(cover, x, y, radius)
    best, second = sorted(scores, key=lambda shape: -scores[shape])[:2]
    uneven, margin = (_bound(points, radius) for points in (_UNEVEN, _MARGIN))
    displacement = (1.0 - scores[best]) * np.pi / _OUTLINE[best]
    return best if displacement <= uneven and scores[best] - scores[second] >= margin else None


def _bound(points: tuple[tuple[float, float], ...], radius: float) -> float:
    radii, bounds = zip(*points)
    return float(np.interp(radius, radii, bounds))


def shape_scores(cover: Float[np.ndarray, "h w"], x: float, y: float, radius: float) -> dict[Shape, float]:
    """The soft intersection over union, 0 to 1, of a mask with each shape at its place and size.

    Args:
        cover: How much of each pixel the object covers, 0 to 1.
        x: The centre of area, from the left, in pixels.
        y: The centre of area, from the top, in pixels.
        radius: That of the circle of the same area, in pixels.
    """
    mask = _sharpen(_sample(cover, x, y, radius)).ravel()
    step = round(np.log(max(radius, 1.0)) / np.log(_RADIUS_STEP))
    templates, sums = _templates(step)
    common = np.minimum(templates, mask).sum(-1)  # (shapes, variants)
    matches = (common / (sums + mask.sum() - common)).max(-1)
    return {shape: float(match) for shape, match in zip(Shape, matches)}


def _sharpen(mask: np.ndarray) -> np.ndarray:
    """Steepens edges, so that slight blur and noise do not count."""
    return np.clip(2 * mask - 0.5, 0.0, 1.0).astype(np.float32)


def _sample(
    cover: np.ndarray, x: float, y: float, radius: float, scale: float = 1.0
) -> Float[np.ndarray, "g g"]:
    """A mask in the common frame: centred, one radius being the same number of samples for every object."""
    steps = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _FRAME * radius / scale
    # The weights of linear interpolation factor into rows and columns: two small matrix products.
    rows, columns = (_hat(at - 0.5 + steps, count) for at, count in zip((y, x), cover.shape))
    return rows @ cover @ columns.T


def _hat(positions: Float[np.ndarray, " g"], count: int) -> Float[np.ndarray, "g w"]:
    return np.maximum(1.0 - np.abs(positions[:, None] - np.arange(count)), 0.0).astype(np.float32)


@functools.lru_cache(maxsize=128)
def _templates(step: int) -> tuple[Float32[np.ndarray, "s v p"], Float32[np.ndarray, "s v"]]:
    """All shapes at a radius of _RADIUS_STEP ** step pixels, shifted and scaled variants of each; their sums."""
    radius = _RADIUS_STEP**step
    side = 2 * int(np.ceil(1.8 * radius)) + 2
    variants = []
    for shape in Shape:
        drawn = shapes_render.coverage(shape, side, radius=radius / side)
        for dx in _SHIFTS:
            for dy in _SHIFTS:
                for scale in _SCALES:
                    centre = side / 2 + radius * np.array([dx, dy])
                    variants.append(_sharpen(_sample(drawn, centre[0], centre[1], radius, scale)).ravel())
    stacked = np.stack(variants).reshape(len(Shape), -1, _GRID**2)
    return stacked, stacked.sum(-1)
