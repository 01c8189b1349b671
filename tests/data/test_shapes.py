"""The embedded data: determinism, geometry, captions, and the pairs that training never shows."""

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.data import shapes, shapes_captions, shapes_render
from imagen_jax.data.shapes import HELD_OUT, Colour, Relation, Scene, SceneObject, Shape, Size


def _pairs(scene):
    return {(item.colour, item.shape) for item in scene.objects}


@pytest.fixture(scope="module")
def training_scenes():
    return [shapes.scene(index) for index in range(20_000)]


def test_scene_and_picture_depend_on_split_and_index_only():
    forwards = [shapes_render.render(shapes.scene(index), 32) for index in range(40)]
    np.random.seed(0)
    backwards = [shapes_render.render(shapes.scene(index), 32) for index in reversed(range(40))][::-1]
    assert np.array_equal(forwards, backwards)
    assert len({picture.tobytes() for picture in forwards}) == 40
    assert not np.array_equal(forwards[0], shapes_render.render(shapes.scene(0, split="test"), 32))


def test_scenes_are_the_same_in_another_process():
    code = (
        "from imagen_jax.data import shapes, shapes_captions, shapes_render;"
        "print([(s.caption, s.placements()) for s in map(shapes.scene, range(20))])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [(s.caption, s.placements()) for s in map(shapes.scene, range(20))]
    assert other.stdout.strip() == str(here)


def test_every_resolution_shows_the_same_scene():
    for index in range(30):
        scene = shapes.scene(index)
        small = shapes_render.render(scene, 32).astype(float)
        for factor in (2, 4, 8):
            large = shapes_render.render(scene, 32 * factor).astype(float)
            reduced = large.reshape(32, factor, 32, factor, 3).mean((1, 3))
            assert np.abs(reduced - small).max() <= 6.0  # of 255, at single edge pixels
            assert np.abs(reduced - small).mean() <= 0.2


@pytest.mark.parametrize("resolution", [16, 33, 1024])
def test_any_resolution_is_drawn(resolution):
    picture = shapes_render.render(shapes.scene(3), resolution)
    assert picture.shape == (resolution, resolution, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == shapes.scene(3).background.rgb


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("radius", [0.145, 0.17, 0.285])
def test_area_and_centre_are_the_ones_asked_for(shape, radius):
    mask = shapes_render.coverage(shape, 200, x=0.48, y=0.51, radius=radius)
    places = (np.arange(200) + 0.5) / 200
    assert mask.mean() == pytest.approx(np.pi * radius**2, rel=2e-3)
    assert (mask.sum(0) @ places) / mask.sum() == pytest.approx(0.48, abs=1e-3)
    assert (mask.sum(1) @ places) / mask.sum() == pytest.approx(0.51, abs=1e-3)


def test_shapes_are_what_their_names_say():
    # Facts of geometry: the share of the bounding box that each shape fills, and its extents.
    def box(shape):
        mask = shapes_render.coverage(shape, 400, radius=0.25) > 0.5
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        return mask.sum() / (height * width), height / width

    assert box(Shape.CIRCLE) == pytest.approx((np.pi / 4, 1.0), abs=0.01)
    assert box(Shape.SQUARE) == pytest.approx((1.0, 1.0), abs=0.01)
    assert box(Shape.TRIANGLE) == pytest.approx((0.5, np.sqrt(3) / 2), abs=0.01)
    assert box(Shape.CROSS) == pytest.approx((5 / 9, 1.0), abs=0.01)
    pentagon = (1 + np.cos(np.pi / 5)) / (2 * np.sin(2 * np.pi / 5))
    assert box(Shape.STAR)[1] == pytest.approx(pentagon, abs=0.01)


def test_a_star_has_five_tips():
    mask = shapes_render.coverage(Shape.STAR, 400, radius=0.25)
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    ring = mask[
        (200 + 0.3 * 400 * np.sin(angles)).astype(int), (200 + 0.3 * 400 * np.cos(angles)).astype(int)
    ]
    inside = ring > 0.5
    assert np.count_nonzero(inside & ~np.roll(inside, 1)) == 5
    assert mask[200 - 140, 200] == 1.0  # one of them upright


def test_shapes_are_inside_and_apart():
    for index in range(400):
        scene = shapes.scene(index)
        total = np.zeros((32, 32))
        for item, (x, y, radius) in zip(scene.objects, scene.placements()):
            mask = shapes_render.coverage(item.shape, 32, x=x, y=y, radius=radius)
            assert not np.any((mask > 0) & (total > 0))
            total += mask
        assert max(total[0].max(), total[-1].max(), total[:, 0].max(), total[:, -1].max()) < 0.05


def test_colours_are_well_apart():
    values = np.array([colour.rgb for colour in Colour], float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert distances[~np.eye(len(values), dtype=bool)].min() >= 115


def test_held_out_pairs_never_occur_in_training(training_scenes):
    assert len(HELD_OUT) >= 0.15 * len(Colour) * len(Shape)
    for scene in training_scenes:
        assert not _pairs(scene) & HELD_OUT
    seen = set().union(*map(_pairs, training_scenes))
    assert len(seen) == len(Colour) * len(Shape) - len(HELD_OUT)
    assert max(collections.Counter(colour for colour, _ in HELD_OUT).values()) <= 2
    assert max(collections.Counter(shape for _, shape in HELD_OUT).values()) <= 2


def test_test_scenes_ask_for_held_out_pairs():
    seen = set()
    for index in range(1000):
        scene = shapes.scene(index, split="test")
        found = _pairs(scene) & HELD_OUT
        assert found
        seen |= found
    assert seen == HELD_OUT


def test_training_scenes_are_varied(training_scenes):
    singles = [scene for scene in training_scenes if scene.relation is None]
    assert len(singles) / len(training_scenes) == pytest.approx(0.7, abs=0.02)
    sizes = collections.Counter(scene.objects[0].size for scene in singles)
    assert set(sizes) == set(Size) and min(sizes.values()) > 0.47 * len(singles)
    relations = collections.Counter(scene.relation for scene in training_scenes if scene.relation)
    assert set(relations) == set(Relation) and min(relations.values()) > 0.22 * sum(relations.values())
    for attribute, kind in (("colour", Colour), ("shape", Shape)):
        counts = collections.Counter(getattr(o, attribute) for s in training_scenes for o in s.objects)
        assert set(counts) == set(kind)
        assert min(counts.values()) > 0.7 * sum(counts.values()) / len(kind)
    backgrounds = collections.Counter(scene.background for scene in training_scenes)
    assert min(backgrounds.values()) > 0.8 * len(training_scenes) / len(Colour)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_number_of_objects_can_be_chosen(objects, split):
    assert all(len(shapes.scene(i, split=split, objects=objects).objects) == objects for i in range(50))


def test_captions_read_as_agreed():
    single = Scene(
        objects=(SceneObject(colour=Colour.RED, shape=Shape.CIRCLE, size=Size.SMALL),),
        background=Colour.BLUE,
    )
    assert single.caption == "a small red circle on a blue background"
    assert single.caption_zh == "蓝色背景上有一个小的红色圆形"
    pair = Scene(
        objects=(
            SceneObject(colour=Colour.GREEN, shape=Shape.SQUARE),
            SceneObject(colour=Colour.ORANGE, shape=Shape.CROSS),
        ),
        relation=Relation.LEFT_OF,
        background=Colour.WHITE,
    )
    assert pair.caption == "a green square left of an orange cross on a white background"
    assert pair.caption_zh == "白色背景上，一个绿色正方形在一个橙色十字形的左边"


def test_captions_are_read_back_in_both_languages():
    used, captions, scenes = set(), set(), list(shapes_captions.all_scenes())
    for count, scene in enumerate(scenes):
        english, chinese = scene.caption, scene.caption_zh
        captions |= {english, chinese}
        used.update(english.split(), chinese)
        if scene.relation is None or count % 23 == 0:  # all of them would take seconds
            assert shapes_captions.parse(english) == scene
            assert shapes_captions.parse(chinese) == scene
    assert len(scenes) == 40 * 7 * 2 + 4 * (8 * 5 * 4 * 7 + 8 * 7 * 25 * 6)
    assert len(captions) == 2 * len(scenes)
    assert used < set(shapes_captions.words())
    assert list(itertools.islice(shapes_captions.all_captions(), 2)) == [
        scenes[0].caption,
        scenes[0].caption_zh,
    ]


@pytest.mark.parametrize("relation", Relation)
def test_the_picture_stands_as_the_caption_says(relation):
    found = 0
    for index in range(300):
        scene = shapes.scene(index, objects=2)
        first, second = scene.objects
        if scene.relation is not relation or first.colour is second.colour:
            continue
        found += 1
        picture = shapes_render.render(scene, 64)
        (y1, x1), (y2, x2) = (
            np.argwhere((picture == item.colour.rgb).all(-1)).mean(0) for item in scene.objects
        )
        assert {
            Relation.LEFT_OF: x1 < x2 - 20,
            Relation.RIGHT_OF: x1 > x2 + 20,
            Relation.ABOVE: y1 < y2 - 20,
            Relation.BELOW: y1 > y2 + 20,
        }[relation]
    assert found > 20


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle on a blue background",
        "a small red circle on a red background",
        "a small red circle on a blue background.",
        "a red circle left of a red circle on a blue background",
        "a small red hexagon on a blue background",
        "红色背景上有一个小的红色圆形",
        "蓝色背景上有一个红色圆形",
    ],
)
def test_other_captions_are_refused_by_name(caption):
    with pytest.raises(ValueError) as caught:
        shapes_captions.parse(caption)
    assert repr(caption) in str(caught.value)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="index=-1"):
        shapes.scene(-1)
    with pytest.raises(ValueError, match=r"split='valid'.*train, test"):
        shapes.scene(0, split="valid")
    with pytest.raises(ValueError, match="objects=3"):
        shapes.scene(0, objects=3)
    for resolution in (15, 1025):
        with pytest.raises(ValueError, match=f"resolution={resolution}"):
            shapes_render.render(shapes.scene(0), resolution)
    item = SceneObject(colour=Colour.RED, shape=Shape.CIRCLE, size=Size.SMALL)
    with pytest.raises(ValueError, match="background's colour, red"):
        Scene(objects=(item,), background=Colour.RED)
    with pytest.raises(ValueError, match="relation"):
        Scene(objects=(item,), relation=Relation.ABOVE, background=Colour.BLUE)
