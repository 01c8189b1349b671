"""TFRecord files without TensorFlow: a writer, an offset index and a random-access reader.

A record is `uint64 length, uint32 masked CRC of the length, data, uint32 masked CRC of the data`, all
little-endian; the CRC is CRC-32C (https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

import os
import struct
import threading
from types import TracebackType

import google_crc32c
import numpy as np
from etils import epath
from jaxtyping import Int64

from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, check_regular, cloud_storage, is_cloud

_HEADER = struct.Struct("<QI")  # length, its CRC
_FOOTER = struct.Struct("<I")  # CRC of the data
_MASK_DELTA = 0xA282EAD8
_HELP = "the file is damaged: delete it and run `imagen-jax precompute` again"


def masked_crc32c(data: bytes) -> int:
    """CRC-32C rotated right by 15 bits plus a constant, as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


class TFRecordWriter:
    """Writes one TFRecord file under a temporary name; it takes its name when the block ends well.

    Raises:
      UserError: the disk is full; nothing of the file is left.
    """

    def __init__(self, path: epath.PathLike, *, tag: str = ""):
        """Opens the temporary file beside `path`, with a tag of its own where several processes may write it."""
        self._file = AtomicFile(path, tag=tag)
        self.num_records = 0
        self.num_bytes = 0  # size of the file so far

    def write(self, data: bytes) -> None:
        """Appends one record."""
        length = struct.pack("<Q", len(data))
        header = length + _FOOTER.pack(masked_crc32c(length))
        footer = _FOOTER.pack(masked_crc32c(data))
        self._file.write(header + data + footer)
        self.num_records += 1
        self.num_bytes += len(header) + len(data) + len(footer)

    def __enter__(self) -> "TFRecordWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


def _read_at(path: epath.Path, offset: int, length: int) -> bytes:
    """Reads up to `length` bytes at `offset`; safe from any thread."""
    if is_cloud(path):
        # The bytes alone: a file that is kept open reads megabytes ahead, at each of many random places.
        storage, name = cloud_storage(path)
        return storage.cat_file(name, start=offset, end=offset + length)
    # Opened for each read: thousands of shards kept open would pass the limit of open files.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _check_header(path: epath.Path, offset: int, header: bytes) -> int:
    """The length a record header states.

    Raises:
      UserError: the header is cut off or its CRC does not match.
    """
    if len(header) < _HEADER.size:
        raise UserError(f"{path}: record at byte {offset} is cut off; {_HELP}")
    length, crc = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != crc:
        raise UserError(f"{path}: CRC of the record length at byte {offset} does not match; {_HELP}")
    return length


def index_offsets(path: epath.PathLike) -> Int64[np.ndarray, "records_plus_one"]:
    """Byte offset of every record of a file and, last, the end of the file.

    One pass over the record headers; the data is skipped.

    Raises:
      UserError: a length CRC does not match or the last record is cut off; names file and byte offset. Or it is no
        ordinary file.
    """
    path = epath.Path(path)
    check_regular(path)
    offsets = [0]
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while offsets[-1] < size:
            file.seek(offsets[-1])
            length = _check_header(path, offsets[-1], file.read(_HEADER.size))
            end = offsets[-1] + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise UserError(
                    f"{path}: record at byte {offsets[-1]} is cut off "
                    f"({size - offsets[-1]} of {end - offsets[-1]} bytes); {_HELP}"
                )
            offsets.append(end)
    return np.asarray(offsets, np.int64)


class TFRecordReader:
    """Random access to the records of one file, from any number of threads.

    Every read checks both CRCs.

    Args:
      path: local or cloud file.
    """

    def __init__(self, path: epath.PathLike):
        """Does not touch the file: the index is built by the first access."""
        self.path = epath.Path(path)
        self._lock = threading.Lock()
        self._offsets: np.ndarray | None = None

    @property
    def offsets(self) -> Int64[np.ndarray, "records_plus_one"]:
        """Byte offset of every record and the end of the file (see `index_offsets`)."""
        if self._offsets is None:
            with self._lock:
                if self._offsets is None:
                    self._offsets = index_offsets(self.path)
        return self._offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        """The data of record `number`.

        Raises:
          IndexError: no such record.
          UserError: a CRC does not match; names file and byte offset.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: no record {number} among {len(self)}")
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        raw = _read_at(self.path, start, end - start)
        length = _check_header(self.path, start, raw[: _HEADER.size])
        if len(raw) != end - start or length != end - start - _HEADER.size - _FOOTER.size:
            raise UserError(f"{self.path}: record at byte {start} has changed since it was indexed; {_HELP}")
        data = raw[_HEADER.size : -_FOOTER.size]
        if masked_crc32c(data) != _FOOTER.unpack(raw[-_FOOTER.size :])[0]:
            raise UserError(f"{self.path}: CRC of the record data at byte {start} does not match; {_HELP}")
        return data
