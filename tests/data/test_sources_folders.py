"""What strangers' folders and parquet files hold: read by a stated rule, or a listed skip."""

import json
import os

import pytest
from PIL import Image

from imagen_jax.data.examples import Example, Skipped
from imagen_jax.data.pictures import picture_fault
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError
from tests.data.reading import POINTER, outcomes, read_all

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def test_formats_of_a_folder(tmp_path):
    kinds = {
        "jpg": "JPEG",
        "jfif": "JPEG",
        "avif": "AVIF",
        "bmp": "BMP",
        "gif": "GIF",
        "tif": "TIFF",
        "ppm": "PPM",
    }
    kinds |= {"TIFF": "TIFF", "jp2": "JPEG2000", "tga": "TGA", "ico": "ICO", "qoi": "QOI", "webp": "WEBP"}
    for suffix, kind in kinds.items():
        Image.new("RGB", (16, 16), (9, 99, 200)).save(tmp_path / f"{suffix}.{suffix}", kind)
        (tmp_path / f"{suffix}.txt").write_text("a")
    for name in ("video.mp4", "next.jxl", "README", "notes.md", "list.json", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    for stem in ("video", "next", "lonely"):
        (tmp_path / f"{stem}.txt").write_text("a")
    items = read_all(f"folder:{tmp_path}")
    read = [item for item in items if isinstance(item, Example)]
    assert sorted(item.key for item in read) == sorted(kinds)
    assert [picture_fault(item.image) for item in read] == [None] * len(read)
    assert [(item.key, item.reason) for item in items if isinstance(item, Skipped)] == [
        ("lonely.txt", "no picture"),
        ("next.jxl", "kind of file not read"),
        ("video.mp4", "kind of file not read"),
    ]


def test_heic_with_its_package(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (9, 99, 200)))
    picture.save(tmp_path / "a.heic")
    assert picture_fault((tmp_path / "a.heic").read_bytes()) is None


def test_two_pictures_with_one_caption_file(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    for stem in "ab":
        (tmp_path / f"{stem}.txt").write_text("a")
    expected = [("a.jpg", "several pictures"), ("a.png", "several pictures"), "b"]
    assert outcomes(read_all(f"folder:{tmp_path}")) == expected
    items = read_all(f"folder:{tmp_path},image=png")
    assert [(item.key, item.image) for item in items] == [("a", b"a.png"), ("b", b"b.png")]
    lines = [{"file_name": name, "caption": name} for name in ("a.jpg", "./b.png", "a.png", "b.png")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = read_all(f"folder:{tmp_path}")
    found = [(item.key, item.captions) for item in items]
    assert found == [("a.jpg", ("a.jpg",)), ("b", ("./b.png", "b.png")), ("a.png", ("a.png",))]


def test_several_captions_one_a_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"P")
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n two\u2028 \n".encode())
    assert read_all(f"folder:{tmp_path}")[0].captions == ("one", "two")


def test_hugging_faces_listing(tmp_path):
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(folder.encode())
        line = {"file_name": "a.png", "text": f"of {folder}", "note": "n"}
        (tmp_path / folder / "metadata.jsonl").write_text("\ufeff" + json.dumps(line) + "\n")
    items = read_all(f"folder:{tmp_path}")
    assert [(item.key, item.image, item.captions) for item in items] == [
        ("test/a", b"test", ("of test",)),
        ("train/a", b"train", ("of train",)),
    ]
    assert read_all(f"folder:{tmp_path},text=note")[0].captions == ("n",)
    (tmp_path / "train" / "captions.jsonl").write_text('{"file_name": "a.png", "caption": "ours"}')
    assert read_all(f"folder:{tmp_path}/train")[0].captions == ("ours",)


def test_lines_that_name_no_file_of_the_folder(tmp_path):
    folder, secret = tmp_path / "folder", tmp_path / "secret.png"
    folder.mkdir()
    secret.write_bytes(b"secret")
    (folder / "link.png").symlink_to(secret)
    (folder / "inside.png").write_bytes(b"inside")
    (folder / "alias.png").symlink_to("inside.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    names = [
        "alias.png",
        "../secret.png",
        str(secret),
        "x/../../other.png",
        "link.png",
        "",
        ".",
        "a\0b",
        "n" * 5000,
    ]
    names += ["loop.png", "pipe.png", "inside.png/a.png", "inside.png"]
    lines = [json.dumps({"file_name": name, "caption": "x"}) for name in names]
    lines += [
        "[" * 100_000,
        '{"file_name": "\\ud83c.png", "caption": "x"}',
        '{"file_name": "inside.png", "caption": {}}',
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    items = read_all(f"folder:{folder}")
    assert [item.image for item in items if isinstance(item, Example)] == [b"inside", b"inside"]
    reasons = [item.reason for item in items if isinstance(item, Skipped)]
    assert reasons[:4] == ["leads out of the folder"] * 4
    assert reasons.count("captions.jsonl line is not JSON") == 2
    assert reasons.count("cannot be read") >= 5 and len(items) == len(names) + 2
    items = read_all(f"folder:{folder},outside=true")
    assert [item.image for item in items if isinstance(item, Example)].count(b"secret") == 3
    with pytest.raises(UserError, match=r"outside=true\|false, got 'yes'"):
        open_source(f"folder:{folder},outside=yes")
    (folder / "captions.jsonl").unlink()
    (tmp_path / "captions.jsonl").write_text("{}")
    (folder / "captions.jsonl").symlink_to(tmp_path / "captions.jsonl")
    with pytest.raises(UserError, match="leads out of the folder"):
        open_source(f"folder:{folder}")


def test_links_to_folders(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    for place in (folder / "sub", other / "deep"):
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(b"P")
        (place / "a.txt").write_text("a")
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to("sub")
    (folder / "up").symlink_to(tmp_path)
    (folder / "out").symlink_to(other)
    (other / "back").symlink_to(other)
    assert outcomes(read_all(f"folder:{folder}")) == [("out", "leads out of the folder"), "sub/a"]
    assert outcomes(read_all(f"folder:{folder},outside=true")) == ["out/deep/a", "sub/a"]


def test_columns_of_every_parquet_file(tmp_path):
    good = {"image": [b"1"], "text": ["a"]}
    pq.write_table(pa.table(good), tmp_path / "0.parquet")
    other = tmp_path / "1.parquet"
    for columns, message in {
        "caption": ({"image": [b"2"], "caption": ["b"]}, "has no column 'text' for the text"),
        "number": ({"image": [b"2"], "text": [2]}, "the column 'text' is no text column but int64"),
        "picture": ({"image": ["x"], "text": ["b"]}, "the column 'image' is no image column but string"),
    }.values():
        pq.write_table(pa.table(columns), other)
        with pytest.raises(UserError, match=message) as caught:
            open_source(f"parquet:{tmp_path}")
        assert str(other) in str(caught.value)
    pq.write_table(pa.table({"text": pa.nulls(1), "image": pa.array([b"2"], pa.large_binary())}), other)
    assert outcomes(read_all(f"parquet:{tmp_path}")) == ["0#0", ("1#0", "no caption")]


@pytest.mark.parametrize("kind", ["string", "large_string", "list", "dictionary"])
def test_one_caption_that_is_not_utf8(tmp_path, kind):
    texts = pa.array([b"caf\xe9" if i == 70 else b"t%d" % i for i in range(100)], pa.binary())
    column = texts.view(pa.string())
    if kind == "large_string":
        column = texts.cast(pa.large_binary()).view(pa.large_string())
    elif kind == "list":
        column = pa.ListArray.from_arrays(pa.array(range(101), pa.int32()), column)
    elif kind == "dictionary":
        column = column.dictionary_encode()
    table = pa.table({"image": [b"x"] * 100, "text": column, "id": column})
    pq.write_table(table, tmp_path / "x.parquet")
    expected = [f"x#{i}" if i != 70 else ("x#70", "caption is not UTF-8") for i in range(100)]
    assert outcomes(read_all(f"parquet:{tmp_path},text=text")) == expected
    if kind != "list":
        (skip,) = [
            item for item in read_all(f"parquet:{tmp_path},text=text,key=id") if isinstance(item, Skipped)
        ]
        assert (skip.key, skip.detail.startswith("x#70: ")) == ("caf\\xe9", True)


@pytest.mark.parametrize("content", [b"", POINTER, b"PAR1" + bytes(30) + b"\xff\xff\xff\x7fPAR1"])
def test_parquet_files_that_do_not_open(tmp_path, content):
    (tmp_path / "0.parquet").write_bytes(content)
    with pytest.raises(UserError, match="does not open as parquet") as caught:
        open_source(f"parquet:{tmp_path}")
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"image": [b"1"], "text": ["a"]}), tmp_path / "1.parquet")
    assert outcomes(read_all(f"parquet:{tmp_path}")) == [("", "damaged parquet file"), "1#0"]
