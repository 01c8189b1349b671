"""Training batches from record folders: a Grain pipeline whose only state is an example count.

Example g of a run (g = 0, 1, 2, … for ever) is a pure function of (seed, g): the record by a shuffle that
is new in every epoch, the crop and the flip by a hash of (seed, g). A batch
therefore does not depend on the number of processes, threads or restarts.
"""

import dataclasses
import functools
import hashlib
import itertools
import struct
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import grain
import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import BFloat16, Bool

from imagen_jax.data import pictures, records
from imagen_jax.data.embeddings import cut_embedding
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_BATCH, MAX_SIDE, MAX_TEXT_LENGTH, MAX_THREADS, check_numbers
from imagen_jax.sizes import Size

# image uint8 (b, H, W, 3); low_res uint8 (b, h, w, 3) if asked for; text bfloat16 (b, L, d);
# text_mask bool (b, L); index int64 (b,); key str (b,); caption list[str] of b, if asked for
Batch = dict[str, Any]

CUT_TEXTS = "cut_texts"  # number of them in a batch, on its way to `TextCount`

# Examples, at most, that a thread makes at a time: handing each over costs as much as half of making it.
_CHUNK = 16
# Side of the result over that of the picture beyond which too little is left to learn details from.
_MAX_ENLARGEMENT = 2
_MAX_ENLARGED = 0.01  # share of such pictures above which a run says so


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What a batch is made of.

    Raises:
      ValueError: resolutions, crop and sizes do not fit each other.
    """

    path: str  # record folder, local or cloud
    split: str
    size: Size  # of the pictures
    scale: int | None = (
        None  # pixels of a picture per low-resolution pixel, along a side; None: there are none
    )
    crop: int | None = None  # side of a random crop of the picture, pixels; None: the whole picture
    max_text_length: int  # tokens; shorter texts are padded, longer ones cut (`cut_embedding`)
    batch_size: int  # examples, over all processes
    seed: int  # of order, crop and flip; 0 to 2**32 - 1
    shuffle: bool = True  # False: the order of the records, the same in every epoch
    flip: bool = False  # mirror every other picture (captions that say "left" then lie)
    num_threads: int = 8  # that read and decode, per process
    prefetch: int = 2  # batches prepared ahead

    def __post_init__(self):
        """Checks the numbers against each other."""
        for field in ("max_text_length", "batch_size", "num_threads", "prefetch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        check_numbers(
            self,
            **dict.fromkeys(("size", "scale", "crop"), MAX_SIDE),
            max_text_length=MAX_TEXT_LENGTH,
            batch_size=MAX_BATCH,
            num_threads=MAX_THREADS,
            prefetch=MAX_THREADS,
            seed=2**32,  # refused below
        )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")
        if min(self.size) < 1:
            raise ValueError(f"size must be at least 1 pixel a side, got {self.size}")
        if self.scale is not None and (self.scale < 1 or self.size.scaled(1, self.scale) is None):
            raise ValueError(f"scale {self.scale} does not divide {self.size}")
        if self.crop is not None and not (0 < self.crop <= min(self.size) and self.crop % self.grain == 0):
            raise ValueError(
                f"crop must be a multiple of {self.grain} of at most {min(self.size)}, got {self.crop}"
            )

    @property
    def grain(self) -> int:
        """Pixels in which crops are placed: whole low-resolution ones, so that both of a pair show the same."""
        return self.scale or 1

    @property
    def seen(self) -> Size:
        """Of the crops, or of whole pictures."""
        return self.size if self.crop is None else Size(self.crop, self.crop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """The bytes of a record and where they lie."""

    data: bytes
    where: str  # file and byte offset, for messages


class RecordSource:
    """Random access to all records of a split, shard after shard; what Grain reads from.

    Raises:
      UserError: the folder is incomplete, the split is missing or empty, a shard is damaged.
    """

    def __init__(self, path: epath.PathLike, split: str):
        """Reads the folder's JSON files; shards are opened and indexed when first touched."""
        # By one thread: imported by several that read, TFDS's lazy modules and Python's import locks can wait for
        # each other for ever.
        records.example_class()
        info = records.read_folder_info(path)
        self.path = info.path
        self.encoder = info.encoder
        self._lengths = info.split(split).shard_lengths
        self._ends = np.cumsum(self._lengths)
        self._readers = [TFRecordReader(shard) for shard in info.shards(split)]
        if not len(self):
            raise UserError(f"{info.path}: split {split!r} holds no records")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> StoredRecord:
        """Record `index` of the split."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._readers[shard]
        try:
            found = len(reader)
        except FileNotFoundError:
            raise UserError(
                f"{reader.path}: the shard is missing; run `imagen-jax precompute` again"
            ) from None
        if found != self._lengths[shard]:
            raise UserError(
                f"{reader.path}: {found} records, but dataset_info.json says {self._lengths[shard]}"
            )
        number = int(index - (self._ends[shard] - self._lengths[shard]))
        return StoredRecord(data=reader[number], where=f"{reader.path}, byte {reader.offsets[number]}")


class _JoinedEmbeddings:
    """Text embeddings of a folder without pictures, by key."""

    def __init__(self, path: epath.PathLike, split: str):
        self._source = RecordSource(path, split)
        self._index = records.KeyIndex(path, split)
        self.encoder = self._source.encoder
        if len(self._index) != len(self._source):
            raise UserError(
                f"{self._source.path}: the key index of split {split!r} has {len(self._index)} keys for "
                f"{len(self._source)} records; run `imagen-jax precompute` again"
            )

    def find(self, key: str, where: str) -> records.Record:
        """The record of a key.

        Raises:
          UserError: there is none; names key and folder.
        """
        for number in self._index.numbers(key):
            if number >= len(self._source):
                raise UserError(
                    f"{self._source.path}: the key index has record {number} of {len(self._source)}; run "
                    "`imagen-jax precompute` again"
                )
            stored = self._source[number]
            record = records.parse(stored.data, self.encoder.width, stored.where, images=False)
            if record.key == key:
                return record
        raise UserError(
            f"{self._source.path}: no embedding of the key {key!r} ({where}); run "
            "`imagen-jax precompute --embeddings_only` on a source that has it"
        )


def record_count(path: epath.PathLike, split: str) -> int:
    """Number of records of a split: the examples of one epoch.

    Raises:
      UserError: not a complete record folder or no such split.
    """
    return sum(records.read_folder_info(path).split(split).shard_lengths)


def embedding_width(path: epath.PathLike) -> int:
    """Width of the text embeddings of a record folder.

    Raises:
      UserError: not a complete record folder.
    """
    return records.read_folder_info(path).encoder.width


def _pad_texts(
    embeddings: Sequence[BFloat16[np.ndarray, "_ _"]], length: int
) -> tuple[BFloat16[np.ndarray, "batch {length} width"], Bool[np.ndarray, "batch {length}"]]:
    """Pads with zeros (or cuts) text embeddings to `length` tokens; the mask is true on real tokens."""
    text = np.zeros((len(embeddings), length, embeddings[0].shape[1]), ml_dtypes.bfloat16)
    for padded, embedding in zip(text, embeddings):
        padded[: len(embedding)] = cut_embedding(embedding, length)
    tokens = np.array([len(embedding) for embedding in embeddings])
    return text, np.arange(length) < tokens[:, None]


def _random_view(config: PipelineConfig, index: int) -> tuple[bool, int, int]:
    """Whether example `index` is mirrored, and its crop's place in units of `grain` pixels: top, left."""
    # A hash is a counter-based generator too, and ten times as quick as setting up one of NumPy's.
    digest = hashlib.blake2b(struct.pack("<QQ", config.seed, index), digest_size=24).digest()
    flip, top, left = struct.unpack("<QQQ", digest)
    rows, columns = ((whole - seen) // config.grain + 1 for whole, seen in zip(config.size, config.seen))
    return config.flip and flip % 2 == 1, top % rows, left % columns


class PictureCount:
    """How many pictures were decoded, and how many of them were far too small; counted by several threads.

    Args:
      size: that they get.
    """

    def __init__(self, size: Size):
        self._lock = threading.Lock()
        self._size = size
        self._warned = False
        self.decoded = 0
        self.enlarged = 0  # more than twice, along one side

    def add(self, height: int, width: int) -> None:
        """Counts a picture."""
        with self._lock:
            self.decoded += 1
            # Of the largest part of it that has the shape wanted, see `pictures.resize`.
            shrunk = min(height / self._size.height, width / self._size.width)
            self.enlarged += shrunk * _MAX_ENLARGEMENT < 1

    @property
    def enlarged_share(self) -> float:
        """Of the pictures decoded so far; 0 to 1."""
        with self._lock:
            return self.enlarged / max(self.decoded, 1)

    def warning(self) -> str | None:
        """One line, once, if more than a hundredth of the pictures are enlarged."""
        share, side = self.enlarged_share, min(self._size)
        if self._warned or share <= _MAX_ENLARGED:
            return None
        self._warned = True
        return (
            f"warning: {share:.1%} of {self.decoded} pictures have a side of less than half of {side} pixels and are "
            f"enlarged; `imagen-jax precompute --min_side={side}` leaves out smaller ones than that"
        )


class _MakeExample:
    """Turns a stored record into one example of a batch."""

    def __init__(
        self,
        config: PipelineConfig,
        encoder: records.EncoderInfo,
        joined: _JoinedEmbeddings | None,
        captions: bool,
        count: PictureCount,
    ):
        self._count = count
        self._config = config
        self._encoder = encoder
        self._joined = joined
        self._captions = captions

    def __call__(self, index: int, stored: StoredRecord) -> dict[str, Any]:
        config = self._config
        record = records.parse(stored.data, self._encoder.width, stored.where)
        assert record.image is not None  # parse has seen to it
        texts, encoder = record, self._encoder
        if self._joined is not None:
            texts, encoder = self._joined.find(record.key, stored.where), self._joined.encoder
        try:
            exact = pictures.decode_exact(record.image, config.size)
            decoded = pictures.decode_picture(record.image, max(config.size)) if exact is None else exact
        except pictures.DECODE_ERRORS as error:
            reason = pictures.fault_text(error)
            raise UserError(
                f"{stored.where}: picture of {record.key!r} does not decode ({reason})"
            ) from error
        # What was decoded at a fraction of its size is more than large enough.
        height, width = decoded.shape[:2] if isinstance(decoded, np.ndarray) else decoded.size[::-1]
        self._count.add(height, width)
        mirror, top, left = _random_view(config, index)
        try:
            embedding = texts.embedding(encoder.block_size)
        except ValueError as error:
            raise UserError(f"{stored.where}: embedding of {record.key!r}: {error}") from error
        example = {"embedding": embedding, "index": np.int64(index), "key": record.key}
        if self._captions:
            example["caption"] = texts.caption
        columns = slice(None, None, -1 if mirror else 1)
        part = pictures.Part(top * config.grain, left * config.grain, config.seen)
        example["image"] = pictures.resize(decoded, config.size, part)[:, columns]
        if config.scale is not None:
            # From the original, as the stage below saw it, not from the resized picture.
            low, seen = config.size.over(config.scale), config.seen.over(config.scale)
            example["low_res"] = pictures.resize(decoded, low, pictures.Part(top, left, seen))[:, columns]
        return example


def _collate(chunks: Sequence[list[dict[str, Any]]], max_text_length: int) -> Batch:
    """Stacks examples along a new first axis, their texts padded to `max_text_length` tokens."""
    examples = list(itertools.chain.from_iterable(chunks))
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    # Padded only here: most of a padded text is zeros, which are written once this way.
    embeddings = columns.pop("embedding")
    text, text_mask = _pad_texts(embeddings, max_text_length)
    batch: Batch = {"text": text, "text_mask": text_mask, "key": np.array(columns.pop("key"), object)}
    batch[CUT_TEXTS] = sum(len(embedding) > max_text_length for embedding in embeddings)
    if "caption" in columns:
        batch["caption"] = columns.pop("caption")
    return batch | {name: np.stack(column) for name, column in columns.items()}


@dataclasses.dataclass(kw_only=True)
class TextCount:
    """Texts of the batches so far."""

    seen: int = 0
    cut: int = 0  # of these, those with more tokens than a batch has room for

    def add(self, batch: Batch) -> None:
        """Counts a batch's, and takes their number out of it."""
        self.seen += len(batch["index"])
        self.cut += batch.pop(CUT_TEXTS)

    def __str__(self) -> str:
        return f"{self.cut} of {self.seen} captions ({100 * self.cut / max(1, self.seen):.3g} %)"


class Batches(Iterator[Batch]):
    """An endless iterator over batches; `close` (or the end of a `with` block) stops its threads.

    Attributes:
      texts: those of the batches that were taken.
    """

    def __init__(self, iterator: Any, count: PictureCount):
        """Takes over a Grain iterator and what its threads count."""
        self._iterator = iterator
        self.count = count
        self.texts = TextCount()

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.texts.add(batch)
        return batch

    def close(self) -> None:
        """Stops reading ahead."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_batches(
    config: PipelineConfig,
    *,
    start_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    embeddings: epath.PathLike | None = None,
    captions: bool = False,
) -> Batches:
    """Opens the endless sequence of training batches.

    Batch k holds the examples start_example + k · batch_size and following; of these, process p of n gets
    those whose number is p modulo n, in ascending order.

    Args:
      config: what a batch is made of.
      start_example: number of examples that all processes together have used before: the whole state.
      process_index: this process, from 0.
      process_count: number of processes that share each batch.
      embeddings: folder of `imagen-jax precompute --embeddings_only` with the same split, whose captions
        and text embeddings take the place of the records' own, joined by key; None: the records' own.
      captions: whether a batch also holds its captions, as a list of strings under "caption".

    Returns:
      an iterator over this process's part of each batch; see `Batch` for names, types and shapes.

    Raises:
      ValueError: the batch cannot be shared equally, or a number is negative or out of range.
      UserError: a folder cannot be read or holds no pictures (here), or a record is damaged or its key has
        no embedding (while iterating).
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below process_count {process_count}")
    if config.batch_size % process_count:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of {process_count} processes")
    if start_example < 0:
        raise ValueError(f"start_example must not be negative, got {start_example}")
    local_batch = config.batch_size // process_count
    source = RecordSource(config.path, config.split)
    if not source.encoder.images:
        raise UserError(
            f"{source.path}: holds text embeddings without pictures; name the folder with the pictures as "
            "the data set and this one as its embeddings"
        )
    joined = None if embeddings is None else _JoinedEmbeddings(embeddings, config.split)
    first = start_example + (process_index - start_example) % process_count
    dataset = grain.MapDataset.source(source)
    if config.shuffle:
        dataset = dataset.shuffle(config.seed)
    count = PictureCount(config.size)
    make = _MakeExample(config, source.encoder, joined, captions, count)
    dataset = dataset.repeat().map_with_index(make)
    chunk = max(size for size in range(1, _CHUNK + 1) if local_batch % size == 0)
    read_options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=max(config.num_threads, config.prefetch * local_batch // chunk),
    )
    examples = dataset.slice(slice(first, None, process_count))
    chunks = examples.batch(chunk, drop_remainder=True, batch_fn=list).to_iter_dataset(read_options)
    collate = functools.partial(_collate, max_text_length=config.max_text_length)
    batches = chunks.batch(local_batch // chunk, batch_fn=collate)
    # Put together in a thread of their own: else the training loop would do it between two steps.
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
    return Batches(iter(ahead), count)
