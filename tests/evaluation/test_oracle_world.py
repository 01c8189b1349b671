"""The oracle on the richer world: textures, sizes in company, counts, pictures that are not square."""

import numpy as np
import pytest
from scipy import ndimage

from imagen_jax.data import shapes, shapes_captions, shapes_render
from imagen_jax.data.shapes import Colour, Shape, Size, Texture
from imagen_jax.data.shapes_world import Jitter, Kind, world_scene
from imagen_jax.evaluation import oracle

SCENES = {
    kind: [
        world_scene(i, split=split, kind=kind, jitter=j)
        for i in range(60)
        for split in ("train", "test")
        for j in Jitter
    ]
    for kind in Kind
}
FIELDS = ("background", "colour", "shape", "size", "texture", "relation", "count")


def _score(scenes, pictures):
    result = oracle.score(pictures, [scene.caption for scene in scenes])
    return {name: result[name] for name in FIELDS if name in result}


def _render(scene, side=64):
    return shapes_render.render(scene, side)


def _spoil(picture, random):
    soft = ndimage.gaussian_filter(picture.astype(float), (0.5, 0.5, 0))
    return np.clip(np.rint(soft + random.uniform(-10, 10, soft.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("side", [64, 128])
def test_every_kind_is_read_right(kind, side):
    found = _score(SCENES[kind], [_render(scene, side) for scene in SCENES[kind]])
    own = {Kind.LONE: set(), Kind.PAIR: {"relation"}, Kind.EQUAL: {"count"}}[kind]
    assert set(found) == {"background", "colour", "shape", "size", "texture"} | own
    assert min(found.values()) >= 0.995


@pytest.mark.parametrize("kind", Kind)
def test_noise_and_blur_are_forgiven(kind):
    random = np.random.default_rng(1)
    assert (
        min(_score(SCENES[kind], [_spoil(_render(each), random) for each in SCENES[kind]]).values()) >= 0.98
    )


@pytest.mark.parametrize("kind", Kind)
def test_another_scenes_caption_hardly_ever_holds(kind):
    scenes = SCENES[kind]
    captions = [scene.caption for scene in scenes[4:] + scenes[:4]]
    assert oracle.score([_render(scene) for scene in scenes], captions)["fulfilled"] <= 0.01 * len(scenes)


@pytest.mark.parametrize("place", ["left", "middle", "right"])
@pytest.mark.parametrize("wide", [False, True])
def test_rectangles(wide, place):
    """The square picture with more of its background to its sides, or above and below."""
    scenes = [scene for kind in Kind for scene in SCENES[kind][:40]]

    def lengthened(scene):
        picture = _render(scene)
        long = np.empty((64, 112, 3), np.uint8)
        long[:] = scene.background.rgb
        start = {"left": 0, "middle": 24, "right": 48}[place]
        long[:, start : start + 64] = picture
        return long if wide else np.ascontiguousarray(long.swapaxes(0, 1))

    # The rows and columns of the picture are exchanged in a high one: squares and circles look the same then.
    if not wide:
        scenes = [
            s
            for s in scenes
            if s.relation is None
            and s.objects[0].shape in (Shape.SQUARE, Shape.CIRCLE, Shape.CROSS)
            and s.objects[0].texture is not Texture.STRIPED
        ]
    assert min(_score(scenes, [lengthened(scene) for scene in scenes]).values()) >= 0.995
    large = np.repeat(np.repeat(lengthened(scenes[0]), 3, 0), 3, 1)
    assert oracle.check(large, scenes[0].caption) == dict.fromkeys(
        oracle.check(large, scenes[0].caption), True
    )


@pytest.mark.parametrize(
    ("asked", "wrong"),
    {
        "three large striped blue squares on a white background": None,
        "three small striped blue squares on a white background": "size",
        "three large hollow blue squares on a white background": "texture",
        "three large striped red squares on a white background": "colour",
        "three large striped blue stars on a white background": "shape",
        "three large striped blue squares on a yellow background": "background",
    }.items(),
)
def test_each_attribute_of_equal_objects_is_judged_by_itself(asked, wrong):
    right = "three large striped blue squares on a white background"
    names = ("background", "colour", "shape", "size", "texture", "count")
    found = oracle.check(_render(shapes_captions.parse(right)), asked)
    assert found == {name: name != wrong for name in names}


@pytest.mark.parametrize("number", ["a", "two", "four"])
def test_a_wrong_count_fulfils_nothing_but_the_background(number):
    picture = _render(shapes_captions.parse("three large blue squares on a white background"))
    caption = f"{number} large blue square{'s' * (number != 'a')} on a white background"
    parts = oracle.check(picture, caption)
    assert parts.pop("background") is True
    assert not any(parts.values())


def test_sizes_within_a_pair_are_told_apart():
    picture = _render(shapes_captions.parse("a small red star above a blue circle on a white background"))
    for first, second, holds in (
        ("small ", "", True),
        ("small ", "large ", True),  # without a size an object is as large as a large one
        ("", "", None),
        ("large ", "", False),
        ("small ", "small ", False),
    ):
        parts = oracle.check(picture, f"a {first}red star above a {second}blue circle on a white background")
        assert parts.get("size") is holds
        assert parts["colour"] and parts["shape"] and parts["relation"]


def test_textures_within_a_pair_belong_to_their_objects():
    picture = _render(
        shapes_captions.parse("a striped red star above a hollow blue circle on a white background")
    )
    for first, second, holds in (
        ("striped", "hollow", True),
        ("hollow", "striped", False),
        ("striped", "striped", False),
    ):
        caption = f"a {first} red star above a {second} blue circle on a white background"
        assert oracle.check(picture, caption)["texture"] is holds


def test_a_textured_object_is_no_solid_one_and_the_other_way_round():
    for texture in (Texture.STRIPED, Texture.HOLLOW):
        plain = "a large red circle on a white background"
        drawn = f"a large {texture.value} red circle on a white background"
        assert not oracle.check(_render(shapes_captions.parse(drawn)), plain)["shape"]
        parts = oracle.check(_render(shapes_captions.parse(plain)), drawn)
        assert not parts["texture"] and parts["shape"]


def test_solid_pictures_are_read_as_without_textures():
    """The verdict on plain scenes is what it was before textures were known, blemished pictures included."""
    random = np.random.default_rng(3)
    for index in range(100):
        for picture in (_render(shapes.scene(index)), _spoil(_render(shapes.scene(index)), random)):
            assert oracle.read(picture) == oracle.read(picture, textures=False)


# --- insides that are of no texture: the outline is right ------------------------------------------------


def _inside(pattern, random, side):
    """A shape's outline around `pattern`(x, y, random), x and y in radii; None: half stripes, half nothing."""
    shape = list(Shape)[random.integers(len(Shape))]
    radius = random.choice([Size.LARGE.company_radius, Size.SMALL.radius, Size.LARGE.radius])
    x, y = 0.5 + random.uniform(-0.03, 0.03, 2)
    place = {"x": x, "y": y, "radius": radius}
    solid = shapes_render.coverage(shape, side, **place)
    outline = shapes_render.coverage(shape, side, texture=Texture.HOLLOW, **place)
    grid = (np.arange(side) + 0.5) / side
    across, down = np.meshgrid((grid - x) / radius, (grid - y) / radius)
    striped = shapes_render.coverage(shape, side, texture=Texture.STRIPED, **place)
    if pattern is None:
        mask = np.where(across < 0, striped, outline)
    else:
        mask = np.maximum(outline, solid * pattern(across, down, random))
    colours = [np.array(colour.rgb) for colour in Colour]
    ink, ground = (colours[i] for i in random.choice(len(colours), 2, replace=False))
    return np.rint(ground + (ink - ground) * mask[..., None]).astype(np.uint8)


def _stripes(position, period):
    return np.abs((position / period + 0.5) % 1.0 - 0.5) < 0.25


PATTERNS = {
    "half striped, half hollow": None,
    "half solid": lambda x, y, _: x < 0,
    "checkered": lambda x, y, _: (np.floor(x / 0.275) + np.floor(y / 0.275)) % 2,
    "upright stripes": lambda x, y, _: _stripes(x, 0.55),
    "few stripes": lambda x, y, _: _stripes(y, 1.1),
    "many stripes": lambda x, y, _: _stripes(y, 0.3),
    "noise": lambda x, y, random: random.uniform(0, 1, x.shape),
    "pale": lambda x, y, _: 0.5,
    "a ramp": lambda x, y, _: np.clip(0.5 + x / 2, 0, 1),
    "a spot": lambda x, y, _: np.hypot(x, y) < 0.45,
}


@pytest.mark.parametrize("name", PATTERNS)
def test_other_insides_have_no_texture(name):
    random = np.random.default_rng(5)
    pictures = [_inside(PATTERNS[name], random, 64) for _ in range(200)]
    textures = [item.texture for picture in pictures for item in oracle.read(picture).objects]
    assert sum(texture in (Texture.STRIPED, Texture.HOLLOW) for texture in textures) <= 0.01 * len(pictures)


def test_a_broken_outline_is_not_hollow():
    scene = shapes_captions.parse("a large hollow red circle on a white background")
    picture = _render(scene)
    picture[:32, 24:40] = scene.background.rgb
    assert not oracle.check(picture, scene.caption)["texture"]


def test_objects_anywhere_have_their_place_in_the_reading():
    for scene in SCENES[Kind.LONE]:
        ((x, y, radius),) = scene.placements()
        (item,) = oracle.read(_render(scene)).objects
        assert (item.x, item.y, item.radius) == pytest.approx((x, y, radius), abs=0.006)
        assert item.colour is scene.objects[0].colour
