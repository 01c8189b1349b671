import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import pictures, shapes, shapes_render
from imagen_jax.data.examples import Example, Skipped, even_ranges
from imagen_jax.data.shapes_world import Jitter, Kind, world_scene
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError
from imagen_jax.sizes import Size


def png(value=0, size=(8, 8)):
    encoded = io.BytesIO()
    Image.new("RGB", size, (value, 10, 20)).save(encoded, "PNG")
    return encoded.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key, caption="a caption"):
    return [(f"{key}.png", png()), (f"{key}.txt", caption.encode()), (f"{key}.json", b"{}")]


def read_all(source, count=None):
    return [item for unit in source.units(count) for item in source.read(unit)]


def keys(items):
    return [item.key for item in items]


@pytest.fixture
def tars(tmp_path):
    for number in range(3):
        members = [
            m for i in range(number * 10, number * 10 + 10) for m in sample(f"{i:04d}", f" text {i}\n")
        ]
        write_tar(tmp_path / f"{number:05d}.tar", members)
    return f"webdataset:{tmp_path}/*.tar"


def test_webdataset_in_order(tars):
    items = read_all(open_source(tars))
    assert keys(items) == [f"{i:04d}" for i in range(30)]
    assert items[7].captions == ("text 7",)
    assert items[7].image == png()
    assert items[7].file.endswith("00000.tar")


@pytest.mark.parametrize("count", [1, 2, 4, 7, 50])
def test_webdataset_units_hold_every_sample_once(tars, count):
    source = open_source(tars)
    assert len(source.units(count)) == count
    assert keys(read_all(source, count)) == [f"{i:04d}" for i in range(30)]


@pytest.mark.parametrize("limit", [1, 10, 13, 30, 99])
def test_webdataset_limit(tars, limit):
    source = open_source(tars, limit=limit)
    assert keys(read_all(source)) == keys(read_all(source, 4)) == [f"{i:04d}" for i in range(min(limit, 30))]


def test_webdataset_layouts(tmp_path):
    members = [
        ("dir/a.jpg", b"1"),
        ("dir/a.json", json.dumps({"caption": "from json"}).encode()),
        ("b.png", b"2"),
        ("b.TXT", b"upper case"),
        ("c.webp", b"3"),
        ("c.json", json.dumps({"caption": ["one", "", "two"]}).encode()),
        ("d.png", b"4"),
        ("d.txt", b"wins"),
        ("d.json", json.dumps({"caption": "loses"}).encode()),
    ]
    write_tar(tmp_path / "x.tar", members)
    items = read_all(open_source(f"webdataset:{tmp_path}/x.tar"))
    assert {item.key: (item.image, item.captions) for item in items} == {
        "dir/a": (b"1", ("from json",)),
        "b": (b"2", ("upper case",)),
        "c": (b"3", ("one", "two")),
        "d": (b"4", ("wins",)),
    }


def test_webdataset_faulty_samples_are_named(tmp_path):
    members = [
        ("a.png", png()),
        ("b.png", png()),
        ("b.txt", b" \n"),
        ("c.txt", b"no picture"),
        ("d.png", png()),
        ("d.json", b"{"),
        ("e.png", png()),
        ("e.json", b'{"caption": null}'),
        ("f.png", png()),
        ("f.txt", b"\xff\xfe"),
    ]
    write_tar(tmp_path / "x.tar", members + sample("g"))
    items = read_all(open_source(f"webdataset:{tmp_path}/x.tar"))
    assert [item.key for item in items if isinstance(item, Example)] == ["g"]
    assert [(item.key, item.reason) for item in items if isinstance(item, Skipped)] == [
        ("a", "no caption"),
        ("b", "no caption"),
        ("c", "no picture"),
        ("d", "json is not readable"),
        ("e", "no caption"),
        ("f", "caption is not UTF-8"),
    ]
    assert all(item.file.endswith("x.tar") for item in items)


def header_offsets(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data) for member in tar}


@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("where", ["header", "data", "boundary"])
def test_truncated_tar_keeps_what_is_before(tmp_path, where, count):
    path = tmp_path / "x.tar"
    write_tar(path, [m for i in range(10) for m in sample(f"{i}")])
    header, data = header_offsets(path)["6.png"]
    os.truncate(path, {"header": header + 100, "data": data + 5, "boundary": header}[where])
    write_tar(tmp_path / "y.tar", sample("y"))
    items = read_all(open_source(f"webdataset:{tmp_path}/*.tar"), count)
    assert [item.key for item in items if isinstance(item, Example)] == ["0", "1", "2", "3", "4", "5", "y"]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert [item.reason for item in skipped] == ["truncated or damaged tar"]
    assert skipped[0].key == ("6" if where == "data" else "")


def test_garbage_in_a_tar_is_not_the_end(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [m for i in range(4) for m in sample(f"{i}")])
    header, _ = header_offsets(path)["2.png"]
    data = bytearray(path.read_bytes())
    data[header : header + 512] = b"\x5a" * 512
    path.write_bytes(bytes(data))
    items = read_all(open_source(f"webdataset:{path}"))
    assert keys(items) == ["0", "1", ""]
    assert items[-1].reason == "truncated or damaged tar"


@pytest.mark.parametrize("content", [b"", b"this is not a tar file" * 100])
def test_no_tar_at_all(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    items = read_all(open_source(f"webdataset:{tmp_path}/*.tar", limit=5))
    assert [(item.key, item.reason) for item in items] == [("", "truncated or damaged tar")]


def test_webdataset_fingerprint_follows_the_files(tars, tmp_path):
    before = open_source(tars).fingerprint()
    assert open_source(tars).fingerprint() == before
    write_tar(tmp_path / "00003.tar", sample("new"))
    assert open_source(tars).fingerprint() != before


def test_folder_with_captions_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.jpg", "sub/c.png", "extra.png"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [
        json.dumps({"file_name": "b.png", "caption": "红色的圆"}, ensure_ascii=False),
        json.dumps({"file_name": "a.jpg", "caption": ["x", "y"]}),
        json.dumps({"file_name": "sub/c.png", "caption": ""}),
        "{broken",
        json.dumps({"caption": "nameless"}),
        json.dumps({"file_name": "gone.png", "caption": "z"}),
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = read_all(open_source(f"folder:{tmp_path}"))
    found = [(i.key, i.image, i.captions) for i in items if isinstance(i, Example)]
    assert found == [("b", b"b.png", ("红色的圆",)), ("a", b"a.jpg", ("x", "y"))]
    assert [(i.key, i.reason) for i in items if isinstance(i, Skipped)] == [
        ("sub/c.png", "no caption"),
        ("line 4", "captions.jsonl line is not JSON"),
        ("line 5", "captions.jsonl line without file_name"),
        ("gone.png", "no picture"),
        ("extra.png", "no caption"),
    ]


def test_folder_with_texts(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / f"{i}.PNG").write_bytes(b"%d" % i)
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    (tmp_path / "3.png").write_bytes(b"3")
    (tmp_path / "4.png").write_bytes(b"4")
    (tmp_path / "4.txt").write_bytes(b"\xff")
    (tmp_path / "notes.md").write_text("no picture")
    items = read_all(open_source(f"folder:{tmp_path}"), 3)
    assert [(i.key, i.captions) for i in items[:3]] == [(str(i), (f"caption {i}",)) for i in range(3)]
    assert [(i.key, i.reason) for i in items[3:]] == [
        ("3.png", "no caption"),
        ("4.png", "caption is not UTF-8"),
    ]
    assert keys(read_all(open_source(f"folder:{tmp_path}", limit=2))) == ["0", "1"]


@pytest.mark.parametrize("language", ["en", "zh", "both"])
def test_shapes(language):
    spec = f"shapes:count=50,resolution=32,objects=2,language={language}"
    items = read_all(open_source(spec, split="test"), 4)
    assert len(items) == 50
    scene = shapes.scene(7, split="test", objects=2)
    captions = {"en": (scene.caption,), "zh": (scene.caption_zh,), "both": (scene.caption, scene.caption_zh)}
    assert items[7].captions == captions[language]
    with Image.open(io.BytesIO(items[7].image)) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), shapes_render.render(scene, 32))


@pytest.mark.parametrize("jitter", list(Jitter))
@pytest.mark.parametrize(("objects", "kind"), [("any", None), ("1", Kind.LONE), ("equal", Kind.EQUAL)])
def test_shapes_of_the_rich_world(jitter, objects, kind):
    spec = f"shapes:count=4,world=rich,jitter={jitter.value},objects={objects}"
    items = read_all(open_source(spec, split="test"))
    scene = world_scene(3, split="test", kind=kind, jitter=jitter)
    assert items[3].captions == (scene.caption,)
    with Image.open(io.BytesIO(items[3].image)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), shapes_render.render(scene, 64))


@pytest.mark.parametrize("option", ["objects=equal", "jitter=wide"])
def test_options_of_the_rich_world_name_it(option):
    with pytest.raises(UserError, match=f"{option} with world=rich only"):
        open_source(f"shapes:{option}")


def test_books_of_plain_shapes_that_were_begun_before_stay_valid():
    plain = "ShapesOptions(count=9, resolution=64, language='en', objects='any')"
    assert open_source("shapes:count=9").fingerprint() == plain
    kinds = {open_source(f"shapes:count=9,world=rich,jitter={j}").fingerprint() for j in ("narrow", "wide")}
    assert len(kinds | {plain}) == 3


def test_shapes_as_they_are_drawn():
    item = next(iter(open_source("shapes:count=1").read(range(1))))
    with Image.open(io.BytesIO(item.image)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), shapes_render.render(shapes.scene(0), 64))
    assert item.captions == (shapes.scene(0).caption,)


def test_shapes_limit_and_default_count():
    assert open_source("shapes").size == 20_000
    assert open_source("shapes:count=9", limit=4).size == 4


@pytest.mark.parametrize(
    "spec", ["", "shape", "tfds", "webdataset", "webdataset:", "folder:", "shapes:", "imagefolder:/x"]
)
def test_bad_spec_names_the_accepted_forms(spec):
    with pytest.raises(UserError, match=r"^--source: .*accepted forms: shapes.*webdataset:PATH.*folder:PATH"):
        open_source(spec)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("shapes:size=3", "size=3"),
        ("shapes:count", "count"),
        ("shapes:count=many", "many"),
        ("shapes:count=0", "count=0"),
        ("shapes:resolution=4", "resolution=4"),
        ("shapes:language=fr", "fr"),
        ("shapes:objects=3", "3"),
        ("webdataset:/nowhere/*.tar", "/nowhere/"),
        ("folder:/nowhere", "/nowhere"),
    ],
)
def test_bad_values_are_named(spec, named):
    with pytest.raises(UserError, match=r"^--source: ") as info:
        open_source(spec)
    assert named in str(info.value)
    assert "\n" not in str(info.value)


def test_bad_split_limit_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"--split: .*'other'"):
        open_source("shapes", split="other")
    with pytest.raises(UserError, match=r"--limit: .*0"):
        open_source("shapes", limit=0)
    with pytest.raises(UserError, match="no pictures"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(("size", "count"), [(10, 3), (3, 10), (1, 1), (1000, 7)])
def test_even_ranges_cover_everything_once(size, count):
    ranges = even_ranges(size, count)
    assert [i for r in ranges for i in r] == list(range(size))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_transparent_pictures_lie_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[1, 1] = (0, 0, 0, 128)
    decoded = np.asarray(pictures.decode_picture(encoded(Image.fromarray(rgba))))
    assert decoded.shape == (2, 2, 3)
    assert tuple(decoded[0, 0]) == (200, 0, 0)
    assert tuple(decoded[0, 1]) == (255, 255, 255)
    assert np.abs(decoded[1, 1].astype(int) - 127).max() <= 1  # 255 · (1 - 128/255)


def test_palette_pictures():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    palette.putdata([0, 1])
    opaque = np.asarray(pictures.decode_picture(encoded(palette)))
    assert [tuple(pixel) for pixel in opaque[0]] == [(255, 0, 0), (0, 0, 255)]
    transparent = np.asarray(pictures.decode_picture(encoded(palette, transparency=0)))
    assert [tuple(pixel) for pixel in transparent[0]] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_pictures(mode):
    grey = Image.new("L", (3, 3), 255).convert(mode)
    assert (np.asarray(pictures.decode_picture(encoded(grey))) == 255).all()


def test_sixteen_bit_grey_is_scaled():
    grey = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert [pixel[0] for pixel in np.asarray(pictures.decode_picture(encoded(grey)))[0]] == [0, 128, 255]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture = Image.new("RGB", (20, 10))
    assert pictures.decode_picture(encoded(picture, "JPEG", exif=exif)).size == (10, 20)


def smooth(height, width, mode="RGB"):
    """Waves of a few periods: what is left of a photograph once it is small."""
    rows, columns = np.indices((height, width)) / max(height, width)
    waves = [127 + 60 * np.sin(9 * rows + i) + 60 * np.cos(11 * columns - i) for i in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("smallest", "size"),
    [(128, (320, 256)), (64, (160, 128)), (65, (320, 256)), (32, (80, 64)), (8, (40, 32))],
)
def test_jpegs_are_decoded_at_a_fraction_of_their_size(mode, smallest, size):
    data = encoded(smooth(256, 320, mode), "JPEG", quality=95)
    drafted = pictures.decode_picture(data, smallest)
    assert drafted.size == size and drafted.mode == "RGB"
    small = pictures.resize(drafted, Size(smallest, smallest)).astype(int)
    whole = pictures.resize(pictures.decode_picture(data), Size(smallest, smallest)).astype(int)
    assert np.abs(small - whole).mean() < 1.0 and np.abs(small - whole).max() <= 8


def test_fractions_leave_rotation_and_other_formats_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pictures.decode_picture(encoded(smooth(64, 128), "JPEG", exif=exif), 16).size == (32, 64)
    assert pictures.decode_picture(encoded(smooth(64, 128)), 8).size == (128, 64)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": 6}])
def test_exact_jpegs_have_pillows_pixels(options):
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    data = encoded(smooth(64, 96), "JPEG", quality=90, **options)
    exact = pictures.decode_exact(data, Size(64, 64))
    expected = pictures.decode_picture(data)
    assert exact is not None and np.array_equal(exact, np.asarray(expected))
    for part in (None, pictures.Part(3, 5, Size(16, 16))):
        ours = pictures.resize(exact, Size(64, 64), part)
        assert np.array_equal(ours, pictures.resize(expected, Size(64, 64), part))
        ours = pictures.resize(exact, Size(32, 32), part)
        assert np.array_equal(ours, pictures.resize(expected, Size(32, 32), part))


def test_parts_are_parts_of_the_square():
    picture = smooth(40, 64)
    for resolution in (40, 20):
        whole = pictures.resize(picture, Size(resolution, resolution))
        cut = pictures.resize(picture, Size(resolution, resolution), pictures.Part(2, 7, Size(8, 8)))
        assert np.array_equal(cut, whole[2:10, 7:15])


def test_a_thumbnail_inside_does_not_give_the_size():
    """It is a JPEG of its own in the EXIF data, before the picture's frame."""
    thumbnail = encoded(smooth(16, 16), "JPEG")
    data = encoded(smooth(64, 64), "JPEG")
    app = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = data[:2] + app + data[2:]
    assert pictures.decode_exact(data, Size(16, 16)) is None
    assert pictures.decode_exact(data, Size(64, 64)) is not None


def test_what_is_not_an_exact_colour_jpeg_is_left_to_pillow():
    data = encoded(smooth(64, 96), "JPEG")
    for other in (
        encoded(smooth(64, 96)),
        encoded(smooth(64, 96, "L"), "JPEG"),
        encoded(smooth(64, 96, "CMYK"), "JPEG"),
        data[: len(data) // 2],
        data[:10],
        b"",
    ):
        assert pictures.decode_exact(other, Size(64, 64)) is None
    assert pictures.decode_exact(data, Size(96, 96)) is None


@pytest.mark.parametrize("resolution", [16, 32])
def test_checkerboard_becomes_grey(resolution):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(board[..., None], 3, -1).astype(np.uint8))
    small = pictures.resize(picture, Size(resolution, resolution)).astype(int)
    assert np.abs(small - 127.5).max() < 3


def test_square_is_the_centre():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (pictures.resize(Image.fromarray(wide), Size(8, 8)) == 255).all()
    assert pictures.resize(Image.fromarray(wide), Size(4, 4))[1:3, 1:3].min() == 255
    assert pictures.resize(Image.fromarray(wide.transpose(1, 0, 2)), Size(8, 8)).min() == 255


def test_damaged_pictures_have_a_fault():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    for data in (encoded(noise), encoded(noise, "JPEG"), encoded(noise, "WEBP")):
        assert pictures.picture_fault(data) is None
        assert pictures.picture_fault(data[: len(data) // 2])
    for data in (b"", b"not a picture", encoded(noise)[:30]):
        assert pictures.picture_fault(data)
