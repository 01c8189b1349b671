import dataclasses
import io
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from PIL import Image

from imagen_jax.data import pipeline, records
from imagen_jax.data.pipeline import (
    PipelineConfig,
    RecordSource,
    embedding_width,
    open_batches,
    record_count,
)
from imagen_jax.data.quantise import quantise
from imagen_jax.data.tfrecord import TFRecordWriter
from imagen_jax.errors import UserError
from imagen_jax.sizes import Size

WIDTH = 6
COUNT = 23
LENGTHS = (9, 0, 14)  # records per shard


def png(array):
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    return encoded.getvalue()


def picture(number):
    """Distinct, and in every pixel: red the row, green the column, blue the number."""
    rows, columns = np.indices((16, 16)) * 16
    return np.stack([rows, columns, np.full((16, 16), number)], -1).astype(np.uint8)


def embedding(number):
    return np.full((1 + number % 5, WIDTH), number + 1, ml_dtypes.bfloat16)


def write_folder(folder, images, lengths):
    numbers, num_bytes = iter(range(len(images))), 0
    for shard, length in enumerate(lengths):
        with TFRecordWriter(folder / records.shard_name("t", "train", shard, len(lengths))) as writer:
            for _ in range(length):
                number = next(numbers)
                record = records.Record(
                    key=f"key {number}",
                    image=images[number],
                    caption=f"标题 {number}",
                    text_embedding=embedding(number),
                )
                writer.write(records.serialize(record))
        num_bytes += writer.num_bytes
    split = records.SplitInfo(name="train", shard_lengths=lengths, num_bytes=num_bytes)
    encoder = records.EncoderInfo(
        text_encoder="none", width=WIDTH, max_length=8, dtype="bfloat16", source={"train": "test"}
    )
    info = records.FolderInfo(path=epath.Path(folder), name="t", splits={"train": split}, encoder=encoder)
    records.write_folder_info(info)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    images = [png(picture(number)) for number in range(COUNT)]
    return write_folder(tmp_path_factory.mktemp("records"), images, LENGTHS)


def config(folder, **changes):
    values = {
        "path": str(folder),
        "split": "train",
        "size": Size(16, 16),
        "max_text_length": 4,
        "batch_size": 4,
        "seed": 7,
        "num_threads": 2,
        "prefetch": 1,
    }
    return PipelineConfig(**(values | changes))


def take(config, count, **options):
    with open_batches(config, **options) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def numbers(batch):
    return [int(key.split()[1]) for key in batch["key"]]


def test_texts_that_are_cut_end_rightly_and_are_counted(folder):
    with open_batches(config(folder, shuffle=False, batch_size=5, max_text_length=3)) as batches:
        for _ in range(3):
            batch = next(batches)
            assert not [name for name in batch if "cut" in name]
        # Of five texts of 1, 2, 3, 4 and 5 tokens two are cut.
        assert (batches.texts.seen, batches.texts.cut) == (15, 6)
        assert str(batches.texts) == "6 of 15 captions (40 %)"
    embeddings = [np.arange(n * 2).reshape(n, 2).astype(ml_dtypes.bfloat16) for n in (2, 3, 7)]
    text, mask = pipeline._pad_texts(embeddings, 3)
    assert text[:, :, 0].astype(int).tolist() == [[0, 2, 0], [0, 2, 4], [0, 2, 12]]
    assert mask.sum(1).tolist() == [2, 3, 3]


def test_what_a_batch_holds(folder):
    batch = take(config(folder, scale=2), 1)[0]
    expected = {
        "image": ((4, 16, 16, 3), np.uint8),
        "low_res": ((4, 8, 8, 3), np.uint8),
        "text": ((4, 4, WIDTH), ml_dtypes.bfloat16),
        "text_mask": ((4, 4), np.bool_),
        "index": ((4,), np.int64),
        "key": ((4,), object),
    }
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected
    for row, number in enumerate(numbers(batch)):
        np.testing.assert_array_equal(batch["image"][row], picture(number))
        tokens = min(len(embedding(number)), 4)
        assert batch["text_mask"][row].tolist() == [i < tokens for i in range(4)]
        assert (batch["text"][row][:tokens] == number + 1).all()
        assert (batch["text"][row][tokens:] == 0).all()


def test_texts_are_padded_and_cut(folder):
    batch = take(config(folder, shuffle=False, batch_size=5, max_text_length=3), 1)[0]
    assert numbers(batch) == [0, 1, 2, 3, 4]
    assert batch["text_mask"].sum(1).tolist() == [1, 2, 3, 3, 3]
    batch = take(config(folder, shuffle=False, batch_size=5, max_text_length=9), 1)[0]
    assert batch["text_mask"].sum(1).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("start", [0, 6])
def test_same_batches_from_any_number_of_processes(folder, processes, start):
    settings = config(folder, batch_size=8, scale=2, crop=8, flip=True)
    whole = take(settings, 7, start_example=start)
    parts = [
        take(settings, 7, start_example=start, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step, batch in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        order = np.argsort(joined["index"])
        assert_same({name: array[order] for name, array in joined.items()}, batch)
        for i, part in enumerate(parts):
            assert (part[step]["index"] % processes == i).all()


@pytest.mark.parametrize("step", [1, 5, 6, 13])
def test_restart_at_any_batch(folder, step):
    settings = config(folder, scale=2, crop=8, flip=True)
    assert_same(take(settings, 1, start_example=4 * step)[0], take(settings, step + 1)[step])


def test_threads_and_prefetch_change_nothing(folder):
    one = take(config(folder, num_threads=1), 8)
    many = take(config(folder, num_threads=7, prefetch=5), 8)
    for a, b in zip(one, many, strict=True):
        assert_same(a, b)


def test_each_record_once_per_epoch_in_a_new_order(folder):
    batches = take(config(folder, batch_size=1), 3 * COUNT)
    assert [int(batch["index"][0]) for batch in batches] == list(range(3 * COUNT))
    order = [numbers(batch)[0] for batch in batches]
    epochs = [order[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_seed_decides_the_order(folder):
    def orders(seed):
        return [numbers(batch) for batch in take(config(folder, seed=seed), 4)]

    assert orders(1) == orders(1) != orders(2)


def test_unshuffled_order_is_that_of_the_shards(folder):
    order = [n for batch in take(config(folder, shuffle=False, batch_size=23), 2) for n in numbers(batch)]
    assert order == list(range(COUNT)) * 2


def test_crop_and_its_low_resolution_show_the_same(tmp_path):
    """Every low-resolution pixel is one colour over its 4 × 4 pixels, and no two are alike."""
    small = np.random.default_rng(0).permutation(256).astype(np.uint8)[:64].reshape(8, 8)
    small = np.stack([small, small, small], -1)
    write_folder(tmp_path, [png(small.repeat(4, 0).repeat(4, 1))], (1,))
    settings = config(tmp_path, size=Size(32, 32), scale=4, crop=16, batch_size=64, flip=True)
    batch = take(settings, 1)[0]
    assert batch["image"].shape == (64, 16, 16, 3)
    assert batch["low_res"].shape == (64, 4, 4, 3)
    corners, low_full = set(), take(config(tmp_path, size=Size(8, 8), batch_size=1), 1)[0]["image"][0]
    for image, low_res in zip(batch["image"], batch["low_res"], strict=True):
        cells = image[::4, ::4]  # the picture is constant over a cell
        np.testing.assert_array_equal(image, cells.repeat(4, 0).repeat(4, 1))
        found = [
            (top, left, mirror)
            for top in range(5)
            for left in range(5)
            for mirror in (False, True)
            if np.array_equal(small[top : top + 4, left : left + 4][:, :: -1 if mirror else 1], cells)
        ]
        assert len(found) == 1
        top, left, mirror = found[0]
        expected = low_full[top : top + 4, left : left + 4][:, :: -1 if mirror else 1]
        np.testing.assert_array_equal(low_res, expected)
        corners.add(found[0])
    assert len(corners) > 25
    assert {top for top, _, _ in corners} == {left for _, left, _ in corners} == set(range(5))
    assert {mirror for _, _, mirror in corners} == {False, True}


def test_low_resolution_is_antialiased(tmp_path):
    board = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255)[..., None], 3, -1).astype(np.uint8)
    write_folder(tmp_path, [png(board)], (1,))
    batch = take(config(tmp_path, size=Size(64, 64), scale=4, batch_size=1), 1)[0]
    np.testing.assert_array_equal(batch["image"][0], board)
    assert np.abs(batch["low_res"].astype(int) - 127.5).max() < 3


def test_one_record_repeats_for_ever(tmp_path):
    write_folder(tmp_path, [png(picture(0))], (1,))
    assert [numbers(batch) for batch in take(config(tmp_path), 3)] == [[0] * 4] * 3


def test_very_late_examples(folder):
    batch = take(config(folder), 1, start_example=4 * 10**12)[0]
    assert batch["index"].tolist() == [4 * 10**12 + i for i in range(4)]


def test_helpers(folder):
    assert record_count(folder, "train") == COUNT
    assert embedding_width(folder) == WIDTH
    source = RecordSource(folder, "train")
    assert len(source) == COUNT
    parsed = [records.parse(source[i].data, WIDTH, "here") for i in range(COUNT)]
    assert [record.caption for record in parsed] == [f"标题 {i}" for i in range(COUNT)]


def write_embeddings(folder, numbers, *, dtype):
    """Embeddings of some keys, in the order given, in two shards; token t of key n is n + t/8 everywhere."""
    hashes = []
    halves = (numbers[:3], numbers[3:])
    for shard, half in enumerate(halves):
        with TFRecordWriter(folder / records.shard_name("e", "train", shard, 2)) as writer:
            for number in half:
                plain = np.repeat(number + np.arange(3)[:, None] / 8, 70, 1).astype(np.float32)
                if dtype == "int8":
                    values, scale = quantise(plain)
                else:
                    values, scale = plain.astype(ml_dtypes.bfloat16), None
                key = f"key {number}"
                record = records.Record(
                    key=key,
                    image=None,
                    caption=f"new {number}",
                    text_embedding=values,
                    text_embedding_scale=scale,
                )
                writer.write(records.serialize(record))
                hashes.append(records.key_hash(key))
    lengths = tuple(len(half) for half in halves)
    split = records.SplitInfo(name="train", shard_lengths=lengths, num_bytes=1)
    encoder = records.EncoderInfo(
        text_encoder="other",
        width=70,
        max_length=8,
        dtype=dtype,
        source={"train": "test"},
        block_size=64 if dtype == "int8" else None,
        images=False,
    )
    info = records.FolderInfo(path=epath.Path(folder), name="e", splits={"train": split}, encoder=encoder)
    records.write_key_index(folder, "train", np.array(hashes, np.uint64))
    records.write_folder_info(info)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_embeddings_of_another_folder_are_joined_by_key(folder, tmp_path, dtype):
    order = np.random.default_rng(1).permutation(COUNT + 5).tolist()  # five more than there are pictures
    write_embeddings(tmp_path, order, dtype=dtype)
    own = take(config(folder), 6, captions=True)
    joined = take(config(folder), 6, embeddings=tmp_path, captions=True)
    for mine, other in zip(own, joined, strict=True):
        assert [f"标题 {n}" for n in numbers(mine)] == mine["caption"]
        assert [f"new {n}" for n in numbers(other)] == other["caption"]
        for name in ("image", "index", "key"):
            np.testing.assert_array_equal(mine[name], other[name])
        assert other["text"].shape == (4, 4, 70) and other["text"].dtype == ml_dtypes.bfloat16
        assert other["text_mask"].tolist() == [[True] * 3 + [False]] * 4
        for row, number in enumerate(numbers(other)):
            wanted = np.repeat(np.append(number + np.arange(3) / 8, 0)[:, None], 70, 1)
            np.testing.assert_allclose(other["text"][row].astype(np.float32), wanted, rtol=2**-8)


def test_captions_only_if_asked_for(folder):
    assert "caption" not in take(config(folder), 1)[0]


def test_missing_embedding_is_named(folder, tmp_path):
    write_embeddings(tmp_path, [n for n in range(COUNT) if n != 11], dtype="bfloat16")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}: no embedding of the key 'key 11' \(.*-of-00003, byte"
    ):
        take(config(folder), 6, embeddings=tmp_path)


def test_a_key_index_of_another_folder_is_refused(folder, tmp_path):
    """Its numbers come from a file, and are no records of this one."""
    write_embeddings(tmp_path, list(range(COUNT)), dtype="bfloat16")
    index = np.load(tmp_path / "keys-train.npy")
    np.save(tmp_path / "keys-train.npy", np.stack([index[0], index[1] + np.uint64(COUNT)]))
    with pytest.raises(UserError, match=rf"the key index has record \d+ of {COUNT}; run"):
        take(config(folder), 1, embeddings=tmp_path)


def test_folders_in_the_wrong_places_are_named(folder, tmp_path):
    write_embeddings(tmp_path, list(range(COUNT)), dtype="bfloat16")
    with pytest.raises(UserError, match=rf"{tmp_path}: holds text embeddings without pictures"):
        open_batches(config(tmp_path))
    with pytest.raises(
        UserError, match=r"keys-train\.npy: no such file; only a folder of .*--embeddings_only"
    ):
        open_batches(config(folder), embeddings=folder)
    records.write_key_index(tmp_path, "train", np.arange(5, dtype=np.uint64))
    with pytest.raises(UserError, match="key index of split 'train' has 5 keys for 23 records"):
        open_batches(config(folder), embeddings=tmp_path)
    for content in (b"", b"not an index", (tmp_path / "keys-train.npy").read_bytes()[:-3]):
        (tmp_path / "keys-train.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"keys-train\.npy: not a key index"):
            open_batches(config(folder), embeddings=tmp_path)


def test_scales_of_other_blocks_are_named(folder, tmp_path):
    write_embeddings(tmp_path, list(range(COUNT)), dtype="int8")
    metadata = (tmp_path / "metadata.json").read_text()
    (tmp_path / "metadata.json").write_text(metadata.replace('"block_size": 64', '"block_size": 16'))
    with pytest.raises(
        UserError, match=r"embedding of 'key .*': 2 scales per token for 70 channels in blocks of 16"
    ):
        take(config(folder), 1, embeddings=tmp_path)


def copy_with_damage(folder, tmp_path, number, damage):
    """A copy of the folder where a byte of a record of the last shard is flipped; file and offset."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "t-train.tfrecord-00002-of-00003"
    data = bytearray(shard.read_bytes())
    offset = 0
    for _ in range(number):
        offset += 16 + int.from_bytes(data[offset : offset + 8], "little")
    data[offset + damage] ^= 255
    shard.write_bytes(bytes(data))
    return shard, offset


@pytest.mark.parametrize("damage", [3, 60])
def test_damaged_record_is_named(folder, tmp_path, damage):
    shard, offset = copy_with_damage(folder, tmp_path, 5, damage)
    with pytest.raises(UserError) as info:
        take(config(tmp_path), 6)
    assert str(info.value).startswith(f"{shard}: CRC of the record ")
    assert f"at byte {offset} " in str(info.value)


def test_broken_picture_is_named(tmp_path):
    write_folder(tmp_path, [png(picture(0)), png(picture(1))[:60]], (2,))
    with pytest.raises(UserError, match=r"-00000-of-00001, byte \d+: picture of 'key 1' does not decode"):
        take(config(tmp_path), 1)


def test_missing_shard_folder_and_split_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"no split 'test' \(there: train\)"):
        open_batches(config(folder, split="test"))
    with pytest.raises(UserError, match=r"dataset_info\.json: no such file"):
        open_batches(config(tmp_path))
    write_folder(tmp_path, [png(picture(0))], (1,))
    (tmp_path / "t-train.tfrecord-00000-of-00001").unlink()
    with pytest.raises(UserError, match="of-00001: the shard is missing"):
        take(config(tmp_path), 1)
    write_folder(tmp_path, [], (0,))
    with pytest.raises(UserError, match="'train' holds no records"):
        open_batches(config(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 3},
        {"crop": 20},
        {"crop": 6, "scale": 4},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"max_text_length": 0},
        {"num_threads": 0},
    ],
)
def test_bad_configurations(folder, changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        config(folder, **changes)


def test_bad_processes(folder):
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of 3"):
        open_batches(config(folder), process_count=3)
    with pytest.raises(ValueError, match="process_index 2"):
        open_batches(config(folder), process_index=2, process_count=2)
    with pytest.raises(ValueError, match="-1"):
        open_batches(config(folder), start_example=-1)


def test_reads_without_tensorflow_and_ends_without_closing(folder):
    code = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] == "tensorflow" else find(name, *rest)
)
from imagen_jax.data.pipeline import PipelineConfig, open_batches
from imagen_jax.sizes import Size
batches = open_batches(PipelineConfig(**{dataclasses.asdict(config(folder))!r}))
next(batches)
assert "tensorflow" not in sys.modules
print("read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_pictures_that_are_enlarged_are_counted(tmp_path):
    """Of four, one has a side of less than half of the resolution; one of half of it is not counted."""
    sides = (16, 8, 7, 20)
    write_folder(tmp_path, [png(np.zeros((side, 30, 3), np.uint8)) for side in sides], (4,))
    with open_batches(config(tmp_path, shuffle=False, num_threads=1)) as batches:
        next(batches)
    count = batches.count
    assert count.decoded >= 4 and count.enlarged == (count.decoded + 1) // 4
    line = count.warning()
    assert line.startswith(f"warning: {count.enlarged / count.decoded:.1%} of {count.decoded} pictures")
    assert "--min_side=16" in line and "\n" not in line and count.warning() is None
    with open_batches(config(tmp_path, size=Size(14, 14), shuffle=False)) as batches:
        next(batches)
    assert batches.count.enlarged == 0 and batches.count.warning() is None


def test_a_bomb_of_pixels_in_a_record_is_named(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    write_folder(tmp_path, [png(picture(0))] * 3 + [bomb.getvalue()], (4,))
    with (
        open_batches(config(tmp_path)) as batches,
        pytest.raises(UserError, match=r"'key 3'.*more than .* pixels"),
    ):
        next(batches)
