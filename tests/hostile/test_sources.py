"""Sources of captioned pictures that are none, and samples that would break the job or leave their folder."""

import io
import json
import os
import tarfile

import pytest

from tests.hostile.mutations import DEEP, HALF

SPECS = (
    *("", ":", "x", "shapes:", "shapes:count", "shapes:count=0", "shapes:count=-1", "shapes:count=x"),
    *("shapes:count=1e3", "shapes:count=" + "9" * 30, "shapes:resolution=0", "shapes:resolution=1000000000"),
    *("shapes:language=xx", "shapes:objects=7", "shapes:color=red", "shapes:count=٣x", "shapes:count=5,,x"),
    *(
        "folder:",
        "folder:missing",
        "folder:like.png",
        "folder:records/job",
        "folder:/dev/zero",
        "folder:a\0b",
    ),
    *("folder:" + "x" * 300, "folder:loop", "folder:pipe"),
    *(
        "webdataset:",
        "webdataset:missing/*.tar",
        "webdataset:like.png",
        "webdataset:pictures",
        "webdataset:a\0b",
    ),
    *("webdataset:{0..999999999}.tar", "webdataset:{9..1}.tar", "webdataset:pipe", "webdataset:/dev/zero"),
    *("parquet:", "parquet:missing", "parquet:like.png", "parquet:pictures", "parquet:rows,image=nothing"),
    *(
        "parquet:rows,text=nothing",
        "parquet:rows,size=3",
        "parquet:rows,image=caption",
        "parquet:pipe",
        "parquet:a\0b",
    ),
    *("tfds:", "tfds:missing_data_set", "tfds:./missing", "tfds:pictures", "tfds:records,image=nothing"),
    *(
        "tfds:records,text=nothing",
        "tfds:records,key=nothing",
        "tfds:records,split=nothing",
        "tfds:a\0b",
        "tfds:../x",
    ),
    *(
        "tfds:records,split=train[:200%]",
        "tfds:records,split=train[x]",
        "tfds:records,data_dir=/dev/zero,x=1",
    ),
    *(
        "http://localhost:1/x.tar",
        "webdataset:http://localhost:1/x.tar",
        "folder:gopher://",
        "parquet:gopher://",
    ),
)


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_a_source_that_is_none(spec, place, run):
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")
    outcome = run("precompute", f"--source={spec}", "--text_encoder=encoder", "--out=out")
    if spec == "webdataset:like.png" and outcome.reached:  # a damaged tar is a counted skip
        return
    fault = outcome.fault("--source", spec.partition(":")[2] or spec)
    assert not fault, f"{spec[:60]!r}: {fault}"


SECRET = b"the content of another folder"
# Lines of captions.jsonl of which nothing can be made.
LINES = {
    "absolute": lambda root: json.dumps({"file_name": str(root / "secret.png"), "caption": "x"}),
    "upwards": lambda root: json.dumps({"file_name": "../secret.png", "caption": "x"}),
    "upwards and back": lambda root: json.dumps({"file_name": "sub/../../secret.png", "caption": "x"}),
    "a link out": lambda root: json.dumps({"file_name": "link.png", "caption": "x"}),
    "a link of a folder out": lambda root: json.dumps({"file_name": "linked/secret.png", "caption": "x"}),
    "a pipe": lambda root: json.dumps({"file_name": "pipe.png", "caption": "x"}),
    "a device": lambda root: json.dumps({"file_name": "zero.png", "caption": "x"}),
    "a folder": lambda root: json.dumps({"file_name": "folder.png", "caption": "x"}),
    "its own folder": lambda root: json.dumps({"file_name": ".", "caption": "x"}),
    "no name": lambda root: json.dumps({"file_name": "", "caption": "x"}),
    "a long name": lambda root: json.dumps({"file_name": "x" * 5000 + ".png", "caption": "x"}),
    "a name with NUL": lambda root: json.dumps({"file_name": "a\0b.png", "caption": "x"}),
    "a name of half a character": lambda root: json.dumps({"file_name": HALF + ".png", "caption": "x"}),
    "a caption of half a character": lambda root: json.dumps({"file_name": "1.png", "caption": HALF}),
    "a number for a name": lambda root: json.dumps({"file_name": 7, "caption": "x"}),
    "a number for a caption": lambda root: json.dumps({"file_name": "2.png", "caption": 7}),
    "an object for a caption": lambda root: json.dumps({"file_name": "3.png", "caption": {"x": 1}}),
    "a list of numbers": lambda root: json.dumps({"file_name": "4.png", "caption": [7, None, [[]]]}),
    "null": lambda root: "null",
    "a list": lambda root: "[1]",
    "a number": lambda root: "7",
    "deep": lambda root: "[" * DEEP + "]" * DEEP,
    "5000 digits": lambda root: '{"file_name": "5.png", "caption": "x", "n": ' + "9" * 5000 + "}",
    "not JSON": lambda root: "{x",
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_of_captions(kind, place):
    from imagen_jax.data.examples import Example
    from imagen_jax.data.sources import open_source

    (place / "secret.png").write_bytes(SECRET)
    folder = place / "pictures"
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "linked").symlink_to("..")
    (folder / "sub").mkdir()
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    good = json.dumps({"file_name": "0.png", "caption": "a red circle"})
    (folder / "captions.jsonl").unlink()
    (folder / "captions.jsonl").write_text(f"{LINES[kind](place.root)}\n{good}\n")
    source = open_source(f"folder:{folder}")
    items = [item for unit in source.units() for item in source.read(unit)]
    examples = [item for item in items if isinstance(item, Example)]
    assert "0" in [example.key for example in examples]
    assert SECRET not in [example.image for example in examples]
    for example in examples:
        "".join([example.key, *example.captions]).encode("utf-8")


MEMBERS = {
    "upwards": ("../x.png", b"x"),
    "absolute": ("/x.png", b"x"),
    "no name": ("", b"x"),
    "a name with NUL": ("a\0b.png", b"x"),
    "a name of Latin-1": ("\udce9.png", b"x"),
    "a long name": ("x" * 5000 + ".png", b"x"),
    "only dots": ("...", b"x"),
    "deep JSON": ("9.json", b"[" * DEEP + b"]" * DEEP),
    "JSON that is a list": ("9.json", b"[1]"),
    "JSON that is a number": ("9.json", b"7"),
    "JSON that is no text": ("9.json", b'{"caption": "\xff"}'),
    "half a character": ("9.json", b'{"caption": "\\ud800"}'),
    "a caption that is a number": ("9.json", b'{"caption": 7}'),
    "5000 digits": ("9.json", b'{"caption": "x", "n": ' + b"9" * 5000 + b"}"),
    "a text of Latin-1": ("9.txt", b"\xe9"),
    "an empty text": ("9.txt", b""),
    "an empty picture": ("9.png", b""),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_member_of_a_tar(kind, place, good):
    from imagen_jax.data.examples import Example
    from imagen_jax.data.sources import open_source

    name, content = MEMBERS[kind]
    picture = (good / "pictures" / "0.png").read_bytes()
    members = [(name, content)]
    if name.startswith("9.") and not name.endswith(".png"):
        members.insert(0, ("9.png", picture))
    if name == "9.png":
        members.append(("9.txt", b"x"))
    (place / "tars" / "0.tar").unlink()
    with tarfile.open(place / "tars" / "0.tar", "w", errors="surrogateescape") as tar:
        for each, data in [*members, ("good.png", picture), ("good.txt", b"a red circle")]:
            member = tarfile.TarInfo(each)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(f"webdataset:{place / 'tars'}/*.tar")
    items = [item for unit in source.units() for item in source.read(unit)]
    examples = [item for item in items if isinstance(item, Example)]
    assert "good" in [example.key for example in examples]
    for example in examples:
        "".join([example.key, *example.captions]).encode("utf-8")


@pytest.mark.parametrize("kind", ["a link", "a hard link", "a device", "a pipe", "a folder"])
def test_a_member_that_is_no_file(kind, place, good):
    from imagen_jax.data.examples import Example
    from imagen_jax.data.sources import open_source

    types = {
        "a link": tarfile.SYMTYPE,
        "a hard link": tarfile.LNKTYPE,
        "a device": tarfile.CHRTYPE,
        "a pipe": tarfile.FIFOTYPE,
        "a folder": tarfile.DIRTYPE,
    }
    picture = (good / "pictures" / "0.png").read_bytes()
    (place / "tars" / "0.tar").unlink()
    with tarfile.open(place / "tars" / "0.tar", "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.type, member.linkname = types[kind], "/etc/passwd"
        tar.addfile(member)
        for name, data in (("x.txt", b"x"), ("good.png", picture), ("good.txt", b"a red circle")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(f"webdataset:{place / 'tars'}/*.tar")
    items = [item for unit in source.units() for item in source.read(unit)]
    examples = {item.key: item.image for item in items if isinstance(item, Example)}
    assert examples == {"good": picture}
