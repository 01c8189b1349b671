import io
import os

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data.examples import Example, Skipped
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def png(value=0):
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 10, 20)).save(encoded, "PNG")
    return encoded.getvalue()


def hub_rows(numbers):
    """Rows as `datasets` writes them: the picture is a struct of bytes and path."""
    return pa.table(
        {
            "id": pa.array([f"id-{i}" for i in numbers]),
            "image": pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in numbers]),
            "caption": pa.array([[f"first {i}", f" second {i}\n"] for i in numbers]),
            "score": pa.array([float(i) for i in numbers]),
        }
    )


@pytest.fixture
def folder(tmp_path):
    """Three files of 10 rows in row groups of 4, 4 and 2; one in a folder below."""
    for number, name in enumerate(("a.parquet", "b.parquet", "sub/a.parquet")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table = hub_rows(range(number * 10, number * 10 + 10))
        pq.write_table(table, tmp_path / name, row_group_size=4)
    return tmp_path


def read_all(source, count=None):
    return [item for unit in source.units(count) for item in source.read(unit)]


def keys(items):
    return [item.key for item in items]


ALL_KEYS = [f"{name}#{i}" for name in ("a", "b", "sub/a") for i in range(10)]


def test_reads_what_the_hub_writes(folder):
    source = open_source(f"parquet:{folder}")
    items = read_all(source)
    assert keys(items) == ALL_KEYS and source.size == 30
    assert [item.image for item in items] == [png(i) for i in range(30)]
    assert [item.captions for item in items] == [(f"first {i}", f"second {i}") for i in range(30)]
    assert items[12].file == str(folder / "b.parquet")


@pytest.mark.parametrize("count", [1, 2, 7, 30, 40])
def test_units_hold_every_row_once(folder, count):
    source = open_source(f"parquet:{folder}")
    assert len(source.units(count)) == count
    assert keys(read_all(source, count)) == ALL_KEYS
    last = source.units(count)[-1]
    assert list(source.read(last)) == list(source.read(last))


@pytest.mark.parametrize("limit", [1, 4, 13, 30, 99])
def test_limit(folder, limit):
    source = open_source(f"parquet:{folder}", limit=limit)
    assert source.size == min(limit, 30)
    assert keys(read_all(source)) == keys(read_all(source, 4)) == ALL_KEYS[:limit]


def test_default_units_are_whole_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("imagen_jax.data.parquet.EXAMPLES_PER_UNIT", 7)
    pq.write_table(hub_rows(range(22)), tmp_path / "x.parquet", row_group_size=4)
    units = open_source(f"parquet:{tmp_path}/x.parquet").units()
    assert [[(rows.group, rows.start, rows.stop) for rows in unit] for unit in units] == [
        [(0, 0, 4), (1, 0, 4)],
        [(2, 0, 4), (3, 0, 4)],
        [(4, 0, 4), (5, 0, 2)],
    ]


def test_only_the_wanted_columns_and_a_few_rows_are_decoded(tmp_path, monkeypatch):
    seen = []
    original = pq.ParquetFile.iter_batches

    def spy(self, batch_size, **options):
        for batch in original(self, batch_size, **options):
            seen.append((batch.num_rows, batch.schema.names))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    pq.write_table(hub_rows(range(200)), tmp_path / "x.parquet")
    items = read_all(open_source(f"parquet:{tmp_path},key=id"))
    assert keys(items) == [f"id-{i}" for i in range(200)]
    assert max(rows for rows, _ in seen) <= 64 and sum(rows for rows, _ in seen) == 200
    assert {tuple(names) for _, names in seen} == {("image", "caption", "id")}


def test_plain_bytes_and_text(tmp_path):
    columns = {"jpg": [b"1", b"2"], "thumbnail": [b"x", b"y"], "note": ["n", "m"], "other": ["p", "q"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    items = read_all(open_source(f"parquet:{tmp_path}/*.parquet,text=note"))  # "jpg" is a usual name
    assert [(item.image, item.captions) for item in items] == [(b"1", ("n",)), (b"2", ("m",))]
    items = read_all(open_source(f"parquet:{tmp_path}/x.parquet,image=thumbnail,text=other"))
    assert [(item.image, item.captions) for item in items] == [(b"x", ("p",)), (b"y", ("q",))]


def test_faulty_rows_are_named(tmp_path):
    table = pa.table(
        {
            "id": pa.array([1, 2, 3, 4, None, 6]),
            "image": pa.array(
                [{"bytes": b"a"}, {"bytes": None}, None, {"bytes": b"d"}, {"bytes": b"e"}, {"bytes": b""}],
                pa.struct([("bytes", pa.binary())]),
            ),
            "text": pa.array(["fine", "x", "y", None, "z", "w"]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    items = read_all(open_source(f"parquet:{tmp_path},key=id"))
    assert [item.key for item in items if isinstance(item, Example)] == ["1"]
    assert [(item.key, item.reason) for item in items if isinstance(item, Skipped)] == [
        ("2", "no picture"),
        ("3", "no picture"),
        ("4", "no caption"),
        ("x#4", "no key"),
        ("6", "no picture"),
    ]


@pytest.mark.parametrize("count", [None, 1, 5])
def test_a_damaged_file_does_not_stop_the_others(folder, count):
    (folder / "b.parquet").write_bytes(b"PAR1 nothing here")
    items = read_all(open_source(f"parquet:{folder}"), count)
    assert [item.key for item in items if isinstance(item, Example)] == ALL_KEYS[:10] + ALL_KEYS[20:]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert [(item.file, item.reason) for item in skipped] == [
        (str(folder / "b.parquet"), "damaged parquet file")
    ]
    assert skipped[0].detail


@pytest.mark.parametrize("count", [None, 1, 3, 10])
def test_a_damaged_row_group_loses_only_its_rows(tmp_path, count):
    path = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    data = [rng.bytes(2000) for _ in range(12)]
    pq.write_table(
        pa.table({"image": data, "text": [f"t{i}" for i in range(12)]}),
        path,
        row_group_size=4,
        compression="gzip",
        use_dictionary=False,
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 200)
    items = read_all(open_source(f"parquet:{path}"), count)
    good = [item for item in items if isinstance(item, Example)]
    assert [item.key for item in good] == [f"x#{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert [item.image for item in good] == [data[i] for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    skipped = [(item.key, item.reason) for item in items if isinstance(item, Skipped)]
    assert skipped == [(f"x#{i}", "damaged row group") for i in (4, 5, 6, 7)]


def test_fingerprint_follows_the_files(folder):
    before = open_source(f"parquet:{folder}").fingerprint()
    assert open_source(f"parquet:{folder}").fingerprint() == before
    assert open_source(f"parquet:{folder},key=id").fingerprint() != before
    os.remove(folder / "b.parquet")
    assert open_source(f"parquet:{folder}").fingerprint() != before


def test_errors_say_what_to_do(tmp_path, folder):
    table = pa.table({"a": [b"1"], "b": [b"2"], "c": ["x"], "d": ["y"], "n": [1]})
    (tmp_path / "two").mkdir()
    pq.write_table(table, tmp_path / "two" / "x.parquet")
    for spec, message in {
        f"{tmp_path}/none*.parquet": "no parquet file matches",
        f"{tmp_path}/two": "several image columns (a, b); say which with ,image=COLUMN",
        f"{tmp_path}/two,image=a": "several text columns (c, d)",
        f"{tmp_path}/two,image=a,text=n": "text=n",
        f"{tmp_path}/two,image=a,text=c,key=k": "key=k",
        f"{tmp_path}/two,picture=a": "has no option 'picture=a' (accepted: image=…, text=…, key=…)",
        ",image=a": "wants its path first",
    }.items():
        with pytest.raises(UserError) as caught:
            open_source(f"parquet:{spec}")
        assert message in str(caught.value) and "\n" not in str(caught.value)
