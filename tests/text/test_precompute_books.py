"""Random sources with random damage: every sample comes out as a record or as a line of skipped.jsonl."""

import argparse
import io
import json
import os
import random
import tarfile
import zlib

import numpy as np
import pytest

from imagen_jax.cli import precompute as cli
from imagen_jax.data import records
from imagen_jax.data.encoder_identity import EncoderIdentity
from imagen_jax.data.examples import Example, Source
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.text import precompute as job
from imagen_jax.text import shards as job_shards
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.text.store import TokenCounts
from tests.text.fake_job import contents, png

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

WIDTH = 4
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


class FakeEncoder:
    """An embedding is a function of the caption."""

    name = "fake"
    width = WIDTH
    identity = EncoderIdentity(width=WIDTH, tokenizer="words", sketches=())

    def encode(self, captions, *, max_length):
        return [np.full((2, WIDTH), zlib.crc32(text.encode()) % 97, np.float32) for text in captions]

    def count_tokens(self, captions, *, max_length):
        return TokenCounts(unknown=(0,) * len(captions), useful=2 * len(captions), computed=2 * len(captions))


def damaged_files(rng, number, suffix):
    """Files of one sample, of which something is wrong: (what is put after the key, content)."""
    picture, caption = png(number, 6), f"caption {number}".encode()
    return rng.choice(
        [
            {suffix: picture},
            {".txt": caption},
            {suffix: picture[: rng.randrange(1, len(picture) - 20)], ".txt": caption},
            {suffix: b"", ".txt": caption},
            {suffix: b"<html>404</html>", ".txt": caption},
            {suffix: POINTER, ".txt": caption},
            {suffix: picture, ".txt": b"caf\xe9"},
            {suffix: picture, ".txt": b" \n\t\n"},
            {suffix: picture, ".txt": POINTER},
            {".jxl": picture, ".txt": caption},
        ]
    )


def make_folder(rng, path, count):
    (path / "sub").mkdir(parents=True)
    for number in range(count):
        stem = path / rng.choice(["", "sub"]) / f"{number:03d}"
        suffix = rng.choice([".png", ".PNG", ".jpg"])
        files = {suffix: png(number, 6), ".txt": f"caption {number}".encode()}
        if rng.random() < 0.5:
            files = damaged_files(rng, number, suffix)
        for end, content in files.items():
            stem.with_name(stem.name + end).write_bytes(content)
    os.mkfifo(path / "pipe.png")
    (path / "pipe.txt").write_text("a pipe")
    (path / "README.md").write_text("no sample")
    (path / ".DS_Store").write_bytes(b"no sample")
    return count + 1, f"folder:{path}"


def make_listing(rng, path, count):
    """captions.jsonl, damaged line by line."""
    path.mkdir()
    lines = []
    for number in range(count):
        name = f"{number:03d}.png"
        (path / name).write_bytes(png(number, 6))
        line = json.dumps(
            {"file_name": name, "caption": f"caption {number}\x85\u2028"}, ensure_ascii=False
        ).encode()
        lines.append(line)
        if rng.random() < 0.4:
            (path / name).unlink()
            lines[-1] = rng.choice(
                [
                    line,
                    line[:-3],
                    line.replace(b"caption ", b"caf\xe9 "),
                    b"[" * 100_000,
                    b"17",
                    b'{"file_name": "../%d.png", "caption": "x"}' % number,
                    b'{"file_name": "/etc/passwd#%d", "caption": "x"}' % number,
                    b'{"file_name": "a\\u0000%d", "caption": "x"}' % number,
                    b'{"file_name": "%d%s", "caption": "x"}' % (number, b"n" * 5000),
                    b'{"file_name": "%d.png", "caption": "\\ud83c"}' % number,
                    b'{"file_name": 7}',
                ]
            )
    (path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    return count, f"folder:{path}"


def make_tars(rng, path, count):
    path.mkdir()
    samples = []
    for number in range(count):
        files = {".png": png(number, 6), ".txt": f"caption {number}".encode()}
        if rng.random() < 0.3:
            files = damaged_files(rng, number, ".png")
        elif rng.random() < 0.2:
            captions = [b'{"caption": "\\ud83c"}', b"[" * 100_000, b"{", b"[]", b'{"caption": 3}']
            files = {".png": png(number, 6), ".json": rng.choice(captions)}
        folder = rng.choice(["", "caf\udce9/"])  # a byte of Latin-1
        samples.append((f"{folder}{number:03d}", files))
    for _ in range(3):  # other samples under a key that is there already, side by side
        place = rng.randrange(count // 2, count)
        samples.insert(place, (samples[place][0], {".png": png(count, 6), ".txt": b"again"}))
    samples.append(
        (samples[rng.randrange(count // 2, count)][0], {".png": png(count, 6), ".txt": b"far away"})
    )
    for number, half in enumerate((samples[: count // 3], samples[count // 3 :])):
        members = [(key + end, content) for key, files in half for end, content in files.items()]
        members.insert(1, ("scattered.png", png(0, 6)))  # inside another sample, and far from its caption
        members.append(("scattered.txt", b"caption"))
        name = path / f"{number}.tar{rng.choice(['', '.gz', '.xz'])}"
        mode = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}[name.suffix]
        with tarfile.open(name, mode, encoding="utf-8", errors="surrogateescape") as tar:
            for member, content in members:
                folder, slash, base = member.rpartition("/")
                for inner, data in ((f"{folder}{slash}._{base}", b"Mac"), (member, content)):
                    info = tarfile.TarInfo(inner)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return len(samples) + 2, f"webdataset:{path}/{{0..1}}.tar*"


def make_parquet(rng, path, count):
    path.mkdir()
    rows = [(png(number, 6), f"caption {number}".encode()) for number in range(count)]
    for place in rng.sample(range(count), count // 3):
        picture, caption = rows[place]
        choices = [
            (None, caption),
            (b"", caption),
            (picture, None),
            (picture, b"caf\xe9"),
            (picture[:30], caption),
        ]
        rows[place] = rng.choice([*choices, (POINTER, caption), (picture, b"  ")])
    table = pa.table(
        {
            "image": pa.array([picture for picture, _ in rows], pa.binary()),
            "text": pa.array([caption for _, caption in rows], pa.binary()).view(pa.string()),
        }
    )
    file = path / "x.parquet"
    pq.write_table(table, file, row_group_size=7, compression="gzip", use_dictionary=False)
    groups = pq.ParquetFile(file).metadata
    column = groups.row_group(rng.randrange(groups.num_row_groups)).column(rng.randrange(2))
    with file.open("r+b") as opened:
        opened.seek(column.data_page_offset)
        opened.write(b"\xff" * 60)
    (path / "y.parquet").write_bytes(file.read_bytes()[:-9])
    return count + 1, f"parquet:{path}"


def all_keys(folder):
    info = records.read_folder_info(folder)
    readers = [TFRecordReader(path) for path in info.shards("train")]
    return [records.parse(reader[i], WIDTH, "here").key for reader in readers for i in range(len(reader))]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [make_folder, make_listing, make_tars, make_parquet])
def test_every_sample_is_a_record_or_a_listed_skip(tmp_path, make, seed):
    count, source = make(random.Random(seed), tmp_path / "source", 40)
    results = []
    for name, num_shards in {"one": 3, "two": 3, "other": 1}.items():
        out = tmp_path / name
        config = PrecomputeConfig(source=source, text_encoder="fake", out=str(out), num_shards=num_shards)
        summary = precompute(config, encoder=FakeEncoder())
        skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_bytes().split(b"\n") if line]
        keys = all_keys(out)
        assert len(keys) + len(skipped) == summary.samples == count
        assert len(set(keys)) == len(keys) == summary.captions > 5
        assert len(skipped) == sum(summary.skipped.values()) > 5
        results.append((keys, skipped))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert results[0] == results[2]
    assert b" at 0x" not in (tmp_path / "one" / "skipped.jsonl").read_bytes()


class Fixed(Source):
    """Samples as they are given, of a size that may be wrong."""

    def __init__(self, samples, size=None):
        self.samples = samples
        self._size = size

    size = property(lambda self: self._size)

    def units(self, count=None):
        return [self.samples]

    def read(self, unit):
        return iter(unit)

    def fingerprint(self):
        return "fixed"


def run_with(monkeypatch, tmp_path, source, **changes):
    monkeypatch.setattr(job, "open_source", lambda *_, **__: source)
    values = {"source": "fixed", "text_encoder": "fake", "out": str(tmp_path / "out")}
    return precompute(PrecomputeConfig(**values, **changes), encoder=FakeEncoder())


def example(number, *captions):
    return Example(file="file", key=str(number), image=png(number, 6), captions=captions)


def test_what_a_source_lets_through_is_checked_again(monkeypatch, tmp_path):
    samples = [example(0, "a", "b"), example(1), example(2, "\ud83c"), example(3, "c")]
    summary = run_with(monkeypatch, tmp_path, Fixed(samples))
    assert (summary.samples, summary.captions) == (4, 3)
    assert summary.skipped == {"no caption": 1, "caption with half a character": 1}


def test_a_source_that_loses_samples_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="the source has 3 samples, of which 2 came out"):
        run_with(monkeypatch, tmp_path, Fixed([example(0, "a"), example(1, "b")], 3))


def test_a_shard_that_loses_samples_is_an_error(monkeypatch, tmp_path):
    original = job_shards._usable
    monkeypatch.setattr(job_shards, "_usable", lambda *args, **kinds: original(*args, **kinds)[1:])
    with pytest.raises(RuntimeError, match=r"of 2 samples 1 were used \(1 records\) and 0 skipped"):
        run_with(monkeypatch, tmp_path, Fixed([example(0, "a"), example(1, "b")]))


def test_reports_without_the_books_still_count_as_complete(monkeypatch, tmp_path):
    source = Fixed([example(0, "a"), example(1, "b")], 2)
    assert run_with(monkeypatch, tmp_path, source).samples == 2
    (report,) = (tmp_path / "out" / "job").glob("*.json")
    content = json.loads(report.read_text())
    del content["samples"]
    report.write_text(json.dumps(content))
    summary = run_with(monkeypatch, tmp_path, source)
    assert (summary.samples, summary.written, summary.captions) == (None, 0, 2)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"records": "2"}', "\x00", ""])
def test_a_damaged_report_is_written_again(monkeypatch, tmp_path, content):
    source = Fixed([example(0, "a"), example(1, "b")])
    run_with(monkeypatch, tmp_path, source)
    before = contents(tmp_path / "out")
    (report,) = (tmp_path / "out" / "job").glob("*.json")
    report.write_text(content)
    assert run_with(monkeypatch, tmp_path, source).written == 2
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("captions", "line"),
    [
        (("a",), "samples: 2 = 1 records + 1 skipped"),
        (("a", "b"), "samples: 2 = 1 used, with 2 records, + 1 skipped"),
    ],
)
def test_the_summary_says_the_books(monkeypatch, tmp_path, capsys, captions, line):
    summary = run_with(monkeypatch, tmp_path, Fixed([example(0, *captions), example(1)]))
    cli._print_summary(argparse.Namespace(out="out"), summary)
    assert line in capsys.readouterr().out.split("\n")
