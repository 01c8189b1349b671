"""Pictures of the embedded captioned data's scenes, at any resolution.

Lengths are fractions of the picture's side, x to the right and y down, the picture being the unit square.
"""

import numpy as np
from jaxtyping import Float32, UInt8

from imagen_jax.data.shapes import MAX_RESOLUTION, MIN_RESOLUTION, Scene, Shape, Texture

# Proportions at equal area π (radius 1). Each half extent follows from the shape's area formula.
_SQUARE_HALF = float(np.sqrt(np.pi)) / 2
_TRIANGLE_INRADIUS = float(np.sqrt(np.pi / (3 * np.sqrt(3))))  # equilateral, area 3√3 ρ²
_CROSS_ARM = 0.33  # an arm's width over the cross's length: a third is five equal squares
_CROSS_HALF = float(np.sqrt(np.pi / (2 * _CROSS_ARM - _CROSS_ARM**2))) / 2
_STAR_INNER = 0.47  # inner over outer radius; plumper than the pentagram's 0.38
_STAR_OUTER = float(np.sqrt(np.pi / (5 * _STAR_INNER * np.sin(np.pi / 5))))

# Textures, in radii.
_OUTLINE = 0.2  # of striped and hollow objects
_PERIOD = 0.55  # from stripe to stripe, which are half of it; one lies on the centre

_REACH = 1.65  # no point of a shape of radius 1 is farther from its centre
_SUPERSAMPLED = 128  # pixels; smaller pictures are drawn at least this large and averaged down


def render(scene: Scene, resolution: int) -> UInt8[np.ndarray, "r r 3"]:
    """Renders a scene, antialiased: the same picture at every resolution.

    Args:
        scene: What to render.
        resolution: The picture's side in pixels, 16 to 1024.

    Returns:
        RGB, 0 to 255, (resolution, resolution, 3), row 0 at the top.

    Raises:
        ValueError: The resolution is out of range.
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"resolution={resolution}: choose from {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels")
    picture = np.empty((resolution, resolution, 3), np.float32)
    picture[:] = scene.background.rgb
    for item, (x, y, radius) in zip(scene.objects, scene.placements()):
        mask = coverage(item.shape, resolution, x=x, y=y, radius=radius, texture=item.texture)[..., None]
        picture += mask * (np.array(item.colour.rgb, np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def coverage(
    shape: Shape,
    resolution: int,
    *,
    x: float = 0.5,
    y: float = 0.5,
    radius: float,
    texture: Texture = Texture.SOLID,
) -> Float32[np.ndarray, "r r"]:
    """How much of each pixel a shape covers, 0 to 1.

    Args:
        shape: Which shape.
        resolution: The picture's side in pixels, 1 or more.
        x: The centre of area, from the left, in sides.
        y: The centre of area, from the top, in sides.
        radius: That of the circle of the same area, in sides.
        texture: What of its inside is covered.

    Raises:
        ValueError: A resolution or a radius of zero or less.
    """
    if resolution < 1 or radius <= 0:
        raise ValueError(f"resolution={resolution}, radius={radius}: both must be positive")
    mask = np.zeros((resolution, resolution), np.float32)
    (left, right), (top, bottom) = (_span(centre, radius, resolution) for centre in (x, y))
    if left >= right or top >= bottom:
        return mask
    fine = -(-_SUPERSAMPLED // resolution)  # samples per pixel side
    samples = resolution * fine
    across = ((np.arange(left * fine, right * fine) + 0.5) / samples - x) / radius
    down = ((np.arange(top * fine, bottom * fine) + 0.5) / samples - y) / radius
    distance = _DISTANCE[shape](across[None, :], down[:, None])
    inside = _covered(distance, radius * samples)
    if texture is not Texture.SOLID:
        within = _covered(distance + _OUTLINE, radius * samples)
        if texture is Texture.STRIPED:
            from_stripe = np.abs((down[:, None] / _PERIOD + 0.5) % 1.0 - 0.5) - 0.25
            within *= 1.0 - _covered(_PERIOD * from_stripe, radius * samples)
        inside = inside - within
    inside = inside.reshape(bottom - top, fine, right - left, fine).mean((1, 3))
    mask[top:bottom, left:right] = inside
    return mask


def _covered(distance: np.ndarray, scale: float) -> np.ndarray:
    """How much of a sample lies inside, from its signed distance in radii; `scale`: samples of a radius."""
    return np.clip(0.5 - distance * scale, 0.0, 1.0)


def _span(centre: float, radius: float, resolution: int) -> tuple[int, int]:
    low, high = (centre - _REACH * radius) * resolution - 1, (centre + _REACH * radius) * resolution + 1
    return int(np.clip(np.floor(low), 0, resolution)), int(np.clip(np.ceil(high), 0, resolution))


# Signed distances, negative inside, for shapes of radius 1; x (1, w) and y (h, 1) broadcast. Past a corner
# they are those of the nearest edge's line, which within a pixel of the outline is near enough.


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, _SQUARE_HALF, _SQUARE_HALF)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sides = np.abs(x) * (np.sqrt(3) / 2) - y / 2
    return np.maximum(sides, y) - _TRIANGLE_INRADIUS


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    arm = _CROSS_ARM * _CROSS_HALF
    return np.minimum(_box(x, y, _CROSS_HALF, arm), _box(x, y, arm, _CROSS_HALF))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Ten mirror images of one edge, from an outer corner (angle 0) to an inner one (angle 36°).
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    length = np.hypot(x, y)
    along, aside = length * np.cos(angle), length * np.sin(angle)
    corner = _STAR_OUTER * _STAR_INNER * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = corner - (_STAR_OUTER, 0.0)
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (along - _STAR_OUTER) * normal[0] + aside * normal[1]


_DISTANCE = {
    Shape.CIRCLE: _circle,
    Shape.SQUARE: _square,
    Shape.TRIANGLE: _triangle,
    Shape.CROSS: _cross,
    Shape.STAR: _star,
}
