"""What strangers' archives and folders hold: read by a rule that the documentation states, or a listed skip."""

import gzip
import http.server
import io
import os
import tarfile
import threading

import pytest
from PIL import Image

from imagen_jax.data import webdataset
from imagen_jax.data.examples import Example, Skipped, UnusableError, attempt, printable
from imagen_jax.data.patterns import expand_braces
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError
from tests.data.reading import POINTER, outcomes, read_all


def tar_bytes(members, mode="w", **options):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, **options) as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content) if content else None)
    return packed.getvalue()


def pairs(*keys):
    return [
        member for key in keys for member in ((f"{key}.jpg", b"J%s" % key.encode()), (f"{key}.txt", b"a"))
    ]


def read_tar(tmp_path, content, name="x.tar", options=""):
    """The outcomes for a tar, which must not depend on how it is divided."""
    (tmp_path / name).write_bytes(content)
    spec = f"webdataset:{tmp_path}/{name}{options}"
    items = read_all(spec)
    assert all(read_all(spec, count) == items for count in (1, 2, 5, 30))
    return items


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.jpg a.txt b.jpg b.txt b.jpg b.txt", ["a", "b", ("b", "key occurs twice")]),
        ("a.jpg a.txt a.jpg a.txt a.jpg a.txt", ["a", ("a", "key occurs twice"), ("a", "key occurs twice")]),
        # Which text belongs to which picture is not known.
        ("a.jpg a.jpg a.txt a.txt", [("a", "key occurs twice")] * 2),
        ("a.jpg a.txt b.jpg b.txt a.jpg a.txt", ["a", "b", ("a", "key occurs twice")]),
        ("a.jpg a.txt b.jpg b.txt a.png a.json", ["a", "b", ("a", "key occurs twice")]),
        ("a.jpg b.jpg a.txt b.txt", [("a", "members are not adjacent"), ("b", "members are not adjacent")]),
        ("a.txt b.jpg b.txt a.jpg", [("a", "members are not adjacent"), "b"]),
        ("a.jpg a.txt b.jpg b.txt a.cls", ["a", "b"]),
    ],
)
def test_keys_that_come_again(tmp_path, names, expected):
    content = tar_bytes([(name, b"caption") for name in names.split()])
    assert outcomes(read_tar(tmp_path, content)) == expected
    kept = read_all(f"webdataset:{tmp_path}/x.tar", limit=2)
    assert outcomes(kept)[:2] == expected[:2]


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ("depth.png jpg txt", "", b"1"),
        ("jpg seg.png txt", "", b"0"),
        ("JPG TXT", "", b"0"),
        ("jpg png txt", "", "several pictures"),
        ("jpg png txt", ",image=png", b"1"),
        ("depth.png txt", "", "no picture"),
        ("depth.png txt", ",image=depth.png", b"0"),
        ("jpg txt", ",image=png", "no picture"),
        ("jpg txt alt.txt", ",text=alt.txt", b"0"),
        ("jpg txt", ",text=alt.txt", "no caption"),
        ("heic txt", "", b"0"),
        ("jxl txt", "", "no picture"),
    ],
)
def test_which_member_is_the_picture(tmp_path, names, options, expected):
    content = tar_bytes([(f"a.{name}", b"%d" % i) for i, name in enumerate(names.split())])
    (item,) = read_tar(tmp_path, content, options=options)
    assert (item.image if isinstance(item, Example) else item.reason) == expected


def test_members_that_are_no_samples(tmp_path):
    names = ["._a.jpg", "./._a.txt", ".DS_Store", "__MACOSX/a.jpg", "d/@PaxHeader", "./PaxHeaders.7/a.jpg"]
    assert outcomes(read_tar(tmp_path, tar_bytes([(name, b"x") for name in names] + pairs("d/a")))) == ["d/a"]


def test_links_in_a_tar(tmp_path):
    hard, soft = tarfile.TarInfo("b.jpg"), tarfile.TarInfo("c.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.jpg"
    soft.type, soft.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [*pairs("a"), (hard, b""), ("b.txt", b"b"), (soft, b""), ("c.txt", b"c")]
    first, second, third = read_tar(tmp_path, tar_bytes(members))
    assert (first.image, second.image) == (b"Ja", b"Ja")
    assert (third.key, third.reason) == ("c", "a link or a device in the tar")


def test_a_sparse_member_is_not_unpacked(tmp_path):
    huge = tarfile.TarInfo("a.jpg")
    huge.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}
    huge.pax_headers["GNU.sparse.realsize"] = str(2**40)
    content = tar_bytes(
        [(huge, b"0\n".ljust(512, b"\0")), ("a.txt", b"a"), *pairs("b")], format=tarfile.PAX_FORMAT
    )
    assert outcomes(read_tar(tmp_path, content)) == [("a", "too large"), "b"]


def test_archives_end_to_end_are_read_on(tmp_path):
    content = tar_bytes(pairs("a", "b")) + tar_bytes(pairs("c")) + tar_bytes(pairs("a"))
    assert outcomes(read_tar(tmp_path, content)) == ["a", "b", "c", ("a", "key occurs twice")]


@pytest.mark.parametrize("zeros", [slice(2048, 2560), slice(2048, 40960)])
def test_zeros_in_the_middle_are_not_the_end(tmp_path, zeros):
    big = [(f"{key}.{end}", b"x" * 4000) for key in "abcde" for end in ("jpg", "txt")]
    content = bytearray(tar_bytes([*pairs("0"), *big]))
    content[zeros] = bytes(len(content[zeros]))
    items = read_tar(tmp_path, bytes(content))
    assert outcomes(items)[0] == "0" and items[-1].reason == "truncated or damaged tar"
    assert "from byte 2048 on is unknown" in items[-1].detail


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_compressed_tars(tmp_path, suffix):
    mode = {"tgz": "gz"}.get(suffix, suffix.removeprefix("tar."))
    content = tar_bytes(pairs(*"abcdef"), f"w:{mode}")
    items = read_tar(tmp_path, content, f"x.{suffix}")
    assert outcomes(items) == list("abcdef") and items[3].image == b"Jd"
    (tmp_path / "y.tar").write_bytes(tar_bytes(pairs("y")))
    assert outcomes(read_all(f"webdataset:{tmp_path}")) == [*"abcdef", "y"]
    assert outcomes(read_all(f"webdataset:{tmp_path}", limit=4)) == list("abcd")


def test_a_compressed_tar_that_breaks_off(tmp_path):
    noise = [(f"{key}.{end}", os.urandom(3000)) for key in "abcd" for end in ("jpg", "npy")]
    members = [m for i in range(0, 8, 2) for m in (*noise[i : i + 2], (f"{'abcd'[i // 2]}.txt", b"a"))]
    content = gzip.compress(tar_bytes(members))
    items = read_tar(tmp_path, content[: len(content) // 2], "x.tar.gz")
    assert outcomes(items)[0] == "a" and items[-1].reason == "truncated or damaged tar"
    assert sum(isinstance(item, Skipped) for item in items) <= 2
    (item,) = read_tar(tmp_path, content, "misnamed.tar")
    assert "name it .tar.gz" in item.detail


def test_a_pointer_in_place_of_a_tar(tmp_path):
    (item,) = read_tar(tmp_path, POINTER)
    assert (item.reason, "Git LFS pointer" in item.detail) == ("truncated or damaged tar", True)


def test_braces_are_written_out_as_in_a_shell():
    assert expand_braces("a{08..11}") == ["a08", "a09", "a10", "a11"]
    assert expand_braces("{2..0}{x,yy}") == ["2x", "2yy", "1x", "1yy", "0x", "0yy"]
    assert expand_braces("{a,{b,c}d}") == ["a", "bd", "cd"]
    assert expand_braces("{one}{}{1..x}") == ["{one}{}{1..x}"]
    for pattern in ("{0..999999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(UserError, match="more than 1000000 files"):
            expand_braces(pattern)


def test_braces_in_a_source(tmp_path):
    for number in range(3):
        (tmp_path / f"{number:03d}.tar").write_bytes(tar_bytes(pairs(f"k{number}")))
    (tmp_path / "{0..1}.tar").write_bytes(tar_bytes(pairs("literal")))
    assert outcomes(read_all(f"webdataset:{tmp_path}/{{000..002}}.tar")) == ["k0", "k1", "k2"]
    assert outcomes(read_all(f"webdataset:{tmp_path}/{{002,000}}.tar,image=jpg")) == ["k2", "k0"]
    assert outcomes(read_all(f"webdataset:{tmp_path}/{{0..1}}.tar")) == ["literal"]
    with pytest.raises(UserError, match=r"no file matches '.*/003.tar'"):
        open_source(f"webdataset:{tmp_path}/{{000..003}}.tar")


@pytest.fixture
def server(tmp_path):
    """A web server of a folder, which knows no ranges; what is named cut breaks off."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_):
            pass

        def copyfile(self, source, outputfile):
            outputfile.write(source.read(3000 if "cut" in self.path else -1))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_tars_of_a_web_server(tmp_path, server):
    for name in ("0.tar", "1.tar", "cut.tar"):
        (tmp_path / name).write_bytes(tar_bytes(pairs(*(f"{name[0]}{i}" for i in range(9)))))
    spec = f"webdataset:{server}/{{0..1}}.tar"
    expected = [f"{tar}{i}" for tar in (0, 1) for i in range(9)]
    assert outcomes(read_all(spec)) == outcomes(read_all(spec, 3)) == expected
    assert outcomes(read_all(spec, limit=11)) == expected[:11]
    with pytest.raises(UserError, match=r"/2.tar: HTTP Error 404"):
        open_source(f"webdataset:{server}/{{0..2}}.tar")
    with pytest.raises(UserError, match="broke off after 3000 of"):
        read_all(f"webdataset:{server}/cut.tar")


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.parquet")
    for spec in (
        "webdataset:{}/*.tar",
        "webdataset:{}/pipe.tar",
        "webdataset:{}",
        "parquet:{}",
        "parquet:{}/*.parquet",
    ):
        with pytest.raises(UserError, match="a pipe or a device"):
            open_source(spec.format(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("txt", b"one\r\n\ntwo\x0c\xe2\x80\xa8\xc2\x85three", ("one", "two\x0c\u2028\x85three")),
        ("txt", b"\xef\xbb\xbfmarked", ("marked",)),
        ("txt", POINTER, "Git LFS pointer in place of a caption"),
        ("txt", b"caf\xe9", "caption is not UTF-8"),
        ("json", b'\xef\xbb\xbf{"caption": "marked"}', ("marked",)),
        ("json", b'{"text": ["a", "b"]}', ("a", "b")),
        ("json", b'{"caption": "half \\ud83c"}', "json is not readable"),
        ("json", b'{"caption": "whole \\ud83c\\udf89"}', ("whole 🎉",)),
        ("json", b"[" * 100_000, "json is not readable"),
        ("json", b"[1]", "no caption"),
    ],
)
def test_captions_of_a_member(tmp_path, name, content, expected):
    (item,) = read_tar(tmp_path, tar_bytes([("a.jpg", b"J"), (f"a.{name}", content)]))
    assert (item.captions if isinstance(item, Example) else item.reason) == expected


def test_names_in_other_encodings(tmp_path):
    content = tar_bytes(pairs("café"), format=tarfile.GNU_FORMAT, encoding="latin-1")
    assert outcomes(read_tar(tmp_path, content)) == ["caf\\xe9"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for end, data in ((b"jpg", b"J"), (b"txt", b"a")):
        with open(os.path.join(os.fsencode(folder), b"caf\xe9." + end), "wb") as file:
            file.write(data)
    (item,) = read_all(f"folder:{folder}")
    assert (item.key, item.image) == ("caf\\xe9", b"J")
    item.file.encode()


def test_skips_are_printable_and_the_same_in_every_run():
    def fail():
        Image.open(io.BytesIO(b"no picture"))

    skip = attempt(fail, file="a\udce9", key="b\n\0\ud83c")
    assert (skip.file, skip.key) == ("a\\xe9", "b\\x0a\\x00\\ud83c")
    assert skip.detail == "cannot identify image file"
    assert Skipped(file="", key="", reason="", detail="f at 0x7f12ab\nx").detail == "f x"
    assert printable("图 é") == "图 é"


@pytest.mark.parametrize(
    "error", [ConnectionResetError("gone"), TimeoutError("late"), OSError(24, "Too many")]
)
def test_faults_of_the_machine_are_no_skips(error):
    def fail():
        raise error

    with pytest.raises(UserError, match=r"^--source: x: .*run the same command again"):
        attempt(fail, file="x", key="")
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: (_ for _ in ()).throw(KeyboardInterrupt), file="", key="")
    assert attempt(lambda: (_ for _ in ()).throw(UnusableError("r", "d")), file="", key="").reason == "r"


@pytest.mark.parametrize("spec", ["folder:{}", "webdataset:{}/*.tar", "parquet:{}", "tfds:{}"])
@pytest.mark.parametrize(
    "name", ["/tmp/" + "n" * 5000, "/tmp/a\0b", "/tmp/caf\udce9", "/dev/null", "/tmp/{0..99999999}"]
)
def test_places_that_are_none(spec, name):
    with pytest.raises(UserError, match=r"^--source: |^/dev/null: a pipe or a device") as caught:
        open_source(spec.format(name))
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_pieces_know_the_keys_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "BYTES_PER_UNIT", 2048)
    content = tar_bytes(pairs("a", "b", "c", "a", "b"))
    expected = ["a", "b", "c", ("a", "key occurs twice"), ("b", "key occurs twice")]
    assert outcomes(read_tar(tmp_path, content)) == expected
