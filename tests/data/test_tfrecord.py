import errno
import io
import os
import struct
import subprocess
import sys
import threading

import google_crc32c
import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter
from tensorboardX.record_writer import masked_crc32c as tensorboard_crc

from imagen_jax import files
from imagen_jax.data.tfrecord import TFRecordReader, TFRecordWriter, index_offsets, masked_crc32c
from imagen_jax.errors import UserError

RECORDS = [b"first", b"", bytes(range(256)) * 40, b"last one"]
OFFSETS = np.cumsum([0] + [len(record) + 16 for record in RECORDS])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.tfrecord"
    with TFRecordWriter(path) as writer:
        for record in RECORDS:
            writer.write(record)
    return path


def test_same_bytes_as_another_writer(path, tmp_path):
    other = RecordWriter(str(tmp_path / "other"))
    for record in RECORDS:
        other.write(record)
    other.close()
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("data", RECORDS)
def test_crc_against_tensorboardx(data):
    assert masked_crc32c(data) == tensorboard_crc(data)


def test_crc_of_the_standard_check_string():
    crc = 0xE3069283  # CRC-32C of "123456789", RFC 3720's polynomial
    assert google_crc32c.value(b"123456789") == crc
    rotated = (crc >> 15) | ((crc & 0x7FFF) << 17)
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) % 2**32


def test_random_access_in_any_order(path):
    reader = TFRecordReader(path)
    assert len(reader) == 4
    np.testing.assert_array_equal(reader.offsets, OFFSETS)
    for number in (3, 0, 2, 1, 2):
        assert reader[number] == RECORDS[number]
    for number in (4, -1):
        with pytest.raises(IndexError):
            reader[number]


def test_reading_from_many_threads(tmp_path):
    wanted = [struct.pack("<Q", i) * (1 + i % 300) for i in range(200)]
    with TFRecordWriter(tmp_path / "b") as writer:
        for record in wanted:
            writer.write(record)
    reader, wrong = TFRecordReader(tmp_path / "b"), []

    def read(seed):
        for i in np.random.default_rng(seed).permutation(200):
            if reader[int(i)] != wanted[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_empty_file_has_no_records(tmp_path):
    with TFRecordWriter(tmp_path / "empty"):
        pass
    assert len(TFRecordReader(tmp_path / "empty")) == 0


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("number", range(4))
def test_damaged_data_names_file_and_offset(path, number):
    flip(path, OFFSETS[number + 1] - 3)  # in the CRC of the data, or in the data's last byte
    reader = TFRecordReader(path)
    with pytest.raises(UserError, match=rf"a\.tfrecord: CRC of the record data at byte {OFFSETS[number]} "):
        reader[number]
    other = (number + 1) % 4
    assert reader[other] == RECORDS[other]


@pytest.mark.parametrize("byte", [0, 7, 8, 11])
def test_damaged_length_names_file_and_offset(path, byte):
    flip(path, OFFSETS[2] + byte)
    with pytest.raises(
        UserError, match=rf"a\.tfrecord: CRC of the record length at byte {OFFSETS[2]} "
    ) as info:
        TFRecordReader(path)[0]
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("left", [3, 14, 20])
def test_cut_off_record_names_file_and_offset(path, left):
    os.truncate(path, OFFSETS[3] + left)
    with pytest.raises(UserError, match=rf"a\.tfrecord: record at byte {OFFSETS[3]} is cut off"):
        index_offsets(path)


def test_nothing_under_the_final_name_until_complete(tmp_path):
    with TFRecordWriter(tmp_path / "c") as writer:
        writer.write(b"x" * 100_000)
        assert not (tmp_path / "c").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TFRecordWriter(tmp_path / "c") as writer:
        writer.write(b"x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [10, 100_000])  # the first fails on closing, the second on writing
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, size):
    kind = type(files.epath.Path(tmp_path))
    real = kind.open

    class FullDisk(io.BytesIO):
        def write(self, data):
            if len(data) > 50_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

        def flush(self):
            if not self.closed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode="r", **kwargs):
        real(path, mode, **kwargs).close()
        return FullDisk()

    monkeypatch.setattr(kind, "open", opened)
    with (
        pytest.raises(UserError, match="d: No space left on device; make room and run the same command"),
        TFRecordWriter(tmp_path / "d") as writer,
    ):
        writer.write(b"x" * size)
    assert not list(tmp_path.iterdir())


def test_limit_of_file_size_by_the_system(tmp_path):
    """The real system call refuses, on writing and on closing."""
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from imagen_jax.data.tfrecord import TFRecordWriter
from imagen_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for size in (5000, 1_000_000):
    try:
        with TFRecordWriter({str(tmp_path / "e")!r}) as writer:
            writer.write(b"x" * size)
    except UserError as error:
        assert "/e: File too large" in str(error), error
        continue
    sys.exit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/folder"):
        files.make_folder(tmp_path / "file" / "folder")
