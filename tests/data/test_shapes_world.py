"""The richer world: captions, places, textures, and the pairs that training never shows."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.data import shapes, shapes_captions, shapes_render
from imagen_jax.data.shapes import HELD_OUT, Colour, Relation, Scene, SceneObject, Shape, Size, Texture
from imagen_jax.data.shapes_world import (
    FAMILY,
    Jitter,
    Kind,
    short_captions,
    sibling_scene,
    world_scene,
)
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError


@pytest.fixture(scope="module")
def scenes():
    return [world_scene(index, jitter=jitter) for index in range(1500) for jitter in Jitter]


def test_captions_are_read_back_in_both_languages(scenes):
    used = set()
    for scene in scenes:
        assert shapes_captions.parse(scene.caption) == scene
        assert shapes_captions.parse(scene.caption_zh) == scene
        used.update(scene.caption.split(), scene.caption_zh)
    assert used == set(shapes_captions.words())


def test_captions_say_what_is_there():
    star = SceneObject(colour=Colour.GREEN, shape=Shape.STAR)
    circle = SceneObject(colour=Colour.RED, shape=Shape.CIRCLE, size=Size.SMALL)
    scene = Scene(objects=(star, circle), relation=Relation.ABOVE, background=Colour.WHITE)
    assert scene.caption == "a green star above a small red circle on a white background"
    assert scene.caption_zh == "白色背景上，一个绿色五角星在一个小的红色圆形的上方"
    item = SceneObject(colour=Colour.ORANGE, shape=Shape.CROSS, size=Size.LARGE, texture=Texture.HOLLOW)
    scene = Scene(objects=(item,) * 3, background=Colour.BLUE)
    assert scene.caption == "three large hollow orange crosses on a blue background"
    assert scene.caption_zh == "蓝色背景上有三个大的空心橙色十字形"


@pytest.mark.parametrize(
    "caption",
    [
        "three small blue square on a white background",
        "two red circles on a white background",
        "five small red circles on a white background",
        "two small red circles left of a blue star on a white background",
        "a small solid red circle on a white background",
        "a small red striped circle on a white background",
        "白色背景上有二个小的红色圆形",
        "白色背景上有两个红色圆形",
        "白色背景上，两个小的红色圆形在一个蓝色正方形的上方",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match=caption):
        shapes_captions.parse(caption)


def test_scenes_depend_on_split_index_and_jitter_only(scenes):
    code = (
        "from imagen_jax.data.shapes_world import Jitter, world_scene;"
        "print([(s.caption, s.placements()) for i in range(9) for j in Jitter for s in [world_scene(i, jitter=j)]])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([(s.caption, s.placements()) for s in scenes[:18]])
    assert scenes[0::2] == scenes[1::2]  # jitter moves objects and changes nothing else
    assert world_scene(3, split="test") != world_scene(3)
    for index in (-1, 2**64):
        with pytest.raises(ValueError, match=f"index={index}"):
            world_scene(index)


# Of the first scenes of each split: captions, and each picture's mean colour, written down before this world.
PLAIN = [
    ("a small black circle on a blue background", (24.092, 74.101, 205.939)),
    ("a blue square left of a purple square on a black background", (23.914, 20.943, 39.776)),
    ("an orange star right of a yellow triangle on a green background", (50.72, 149.958, 61.037)),
    ("a large purple circle on a yellow background", (225.651, 185.235, 90.626)),
    ("a large blue triangle on a yellow background", (196.299, 195.441, 102.106)),
    ("a small red star on a white background", (245.91, 229.104, 230.92)),
]


def test_plain_scenes_are_what_they_were():
    scenes = [shapes.scene(index, split=split) for split in ("train", "test") for index in range(3)]
    assert [scene.caption for scene in scenes] == [caption for caption, _ in PLAIN]
    for scene, (_, colour) in zip(scenes, PLAIN):
        assert shapes_render.render(scene, 64).mean((0, 1)) == pytest.approx(colour, abs=0.01)


def test_held_out_pairs_are_in_every_test_scene_and_in_no_other(scenes):
    for scene in scenes:
        assert not {(item.colour, item.shape) for item in scene.objects} & HELD_OUT
    for index in range(500):
        scene = world_scene(index, split="test")
        assert {(item.colour, item.shape) for item in scene.objects} & HELD_OUT


def test_the_world_is_varied(scenes):
    for kind, share in {Kind.LONE: 0.35, Kind.PAIR: 0.4, Kind.EQUAL: 0.25}.items():
        of_kind = [scene for scene in scenes if _kind(scene) is kind]
        assert len(of_kind) / len(scenes) == pytest.approx(share, abs=0.04)
        assert {item.texture for scene in of_kind for item in scene.objects} == set(Texture)
        assert all(_kind(world_scene(index, kind=kind)) is kind for index in range(50))
    counts = collections.Counter(len(scene.objects) for scene in scenes if _kind(scene) is Kind.EQUAL)
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 0.25 * sum(counts.values())
    sizes = {tuple(item.size for item in scene.objects) for scene in scenes if _kind(scene) is Kind.PAIR}
    assert len(sizes) == 9
    small = [item for s in scenes if len(s.objects) > 1 for item in s.objects if item.size is Size.SMALL]
    assert {item.texture for item in small} == {Texture.SOLID}  # stripes would be finer than pixels


def _kind(scene):
    if scene.relation is not None:
        return Kind.PAIR
    return Kind.LONE if len(scene.objects) == 1 else Kind.EQUAL


def test_objects_are_inside_and_apart(scenes):
    for scene in scenes:
        total = np.zeros((64, 64))
        for item, (x, y, radius) in zip(scene.objects, scene.placements()):
            mask = shapes_render.coverage(item.shape, 64, x=x, y=y, radius=radius)
            assert not np.any((mask > 0) & (total > 0)), (scene.caption, scene.placements())
            total += mask
        assert max(total[0].max(), total[-1].max(), total[:, 0].max(), total[:, -1].max()) < 0.05


def test_wide_jitter_reaches_all_over_and_keeps_relations_clear():
    scenes = [world_scene(index, jitter=Jitter.WIDE) for index in range(1500)]
    lone = np.array(
        [s.placements()[0][:2] for s in scenes if len(s.objects) == 1 and s.objects[0].size is Size.SMALL]
    )
    # A small object's centre may be from 0.28 to 0.72: uniform there.
    assert lone.std(0) == pytest.approx([0.43 / 12**0.5, 0.436 / 12**0.5], rel=0.1)
    for scene in (each for each in scenes if each.relation is not None):
        (x0, y0, _), (x1, y1, _) = scene.placements()
        along = (x0 - x1) * scene.relation.direction[0] + (y0 - y1) * scene.relation.direction[1]
        across = abs(y0 - y1) if scene.relation.direction[0] else abs(x0 - x1)
        assert along >= 1.9 * across


@pytest.mark.parametrize("shape", Shape)
def test_textures_are_parts_of_the_shape(shape):
    solid, striped, hollow = (
        shapes_render.coverage(shape, 512, radius=0.285, texture=texture) for texture in Texture
    )
    assert (hollow <= striped + 1e-6).all() and (striped <= solid + 1e-6).all()
    # The outline of a convex shape of inradius ρ: the area between it and its copy that is 0.2 nearer to the centre.
    inradius = {Shape.CIRCLE: 1.0, Shape.SQUARE: np.pi**0.5 / 2, Shape.TRIANGLE: (np.pi / 27**0.5) ** 0.5}
    if shape in inradius:
        within = (1 - 0.2 / inradius[shape]) ** 2
        assert 1 - hollow.sum() / solid.sum() == pytest.approx(within, rel=0.01)
    # About half of what is within the outline is stripes, which are level.
    assert (striped - hollow).sum() / (solid - hollow).sum() == pytest.approx(0.5, abs=0.12)
    middle = np.flatnonzero((solid - hollow)[256] > 0.99)
    assert np.ptp(striped[256, middle]) < 1e-3


def test_every_resolution_shows_the_same_textures():
    for index in range(30):
        scene = world_scene(index, jitter=Jitter.WIDE)
        small, large = (shapes_render.render(scene, side).astype(float) for side in (64, 256))
        reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(reduced - small).mean() <= 0.5


def differences(first, other):
    """Which of the things that a caption can say are not the same in both scenes."""
    if len(first.objects) != len(other.objects):
        return {"number"}
    fields = ("colour", "shape", "size", "texture")
    different = {
        name
        for name in fields
        if any(getattr(a, name) != getattr(b, name) for a, b in zip(first.objects, other.objects))
    }
    if first.relation is not other.relation:
        different.add("relation")
    # Objects that have changed places differ in whatever they differ in.
    return {"order"} if first.objects == other.objects[::-1] and different else different


@pytest.mark.parametrize("split", ["train", "test"])
def test_siblings_differ_in_one_thing(split):
    seen = collections.Counter()
    for family in range(300):
        first, *others = (sibling_scene(FAMILY * family + i, split=split) for i in range(FAMILY))
        expected = world_scene(family, split=split)
        assert first == expected and first.placements() == expected.placements()
        for other in others:
            different = differences(first, other)
            assert len(different) == 1
            assert other.background is first.background
            seen.update(different)
            if split == "train":
                assert not any((item.colour, item.shape) in HELD_OUT for item in other.objects)
    assert (
        min(seen[name] for name in ("colour", "shape", "size", "texture", "number", "relation", "order")) > 20
    )


def test_siblings_lie_as_other_scenes_do():
    for index in range(200):
        scene = sibling_scene(index, jitter=Jitter.WIDE)
        assert scene.placements() == sibling_scene(index, jitter=Jitter.WIDE).placements()
        for item, (x, y, radius) in zip(scene.objects, scene.placements()):
            assert radius < x < 1 - radius and radius < y < 1 - radius
            assert item.texture is Texture.SOLID or len(scene.objects) == 1 or item.size is not Size.SMALL


@pytest.mark.parametrize("split", ["train", "test"])
def test_short_captions_leave_things_out_and_say_nothing_else(split):
    """What they say is a part of the whole caption, in order; in both languages the same is left out."""
    kept, cases = [], range(600)
    for index in cases:
        scene = world_scene(index, split=split)
        english, chinese = short_captions(scene, index, split=split)
        words = iter(scene.caption.replace("an ", "a ").split())
        assert all(word in words for word in english.replace("an ", "a ").split()), (english, scene.caption)
        characters = iter(scene.caption_zh)
        assert all(character in characters for character in chinese), (chinese, scene.caption_zh)
        first = scene.objects[0]
        for item in (first, scene.objects[-1]):
            assert item.colour.value in english and item.shape.value in english
            assert item.colour.zh in chinese and item.shape.zh in chinese
        kept.append([english == scene.caption, "background" in english])
        assert (english == scene.caption) == (chinese == scene.caption_zh)
        assert ("background" in english) == ("背景" in chinese)
    whole, background = np.mean(kept, axis=0)
    assert 0.45 < whole < 0.68 and 0.6 < background < 0.75


def test_short_captions_are_an_option_of_the_source():
    source = open_source("shapes:world=rich,language=zh,captions=short,count=3", split="train", limit=None)
    examples = [example for unit in source.units() for example in source.read(unit)]
    expected = [(short_captions(world_scene(i), i)[1],) for i in range(3)]
    assert [example.captions for example in examples] == expected
    assert source.fingerprint().endswith("captions='short')")
    with pytest.raises(UserError, match="captions=short with world=rich only"):
        open_source("shapes:captions=short", split="train", limit=None)
