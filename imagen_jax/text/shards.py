"""Single shards of the embedding job: what one holds, how it is written, and its report.

A shard is a pure function of its unit of the source and of the job's description: its captions are
batched among themselves, so that neither other shards nor other processes change a byte.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from imagen_jax.data import records
from imagen_jax.data.examples import Example, Skipped, Source
from imagen_jax.data.pictures import picture_fault
from imagen_jax.data.tfrecord import TFRecordWriter
from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, json_field, json_object, read_json, write_text
from imagen_jax.text.store import EmbeddingDtype, StoredEmbedding, TokenCounts, pack

WINDOW = 1024  # samples held in memory with their pictures; their new captions are encoded together
MEMORY = 2**30  # bytes of embeddings remembered per shard, for captions that occur again
_HASH = np.dtype("<u8")
# Fields of `ShardReport`: those that every report has, and those that the first versions did not write.
_COUNTS = ("records", "tokens", "num_bytes", "width")
_LATER_COUNTS = ("unknown", "encoded", "computed")


@runtime_checkable
class Encoder(Protocol):
    """What the job needs of a text encoder."""

    @property
    def name(self) -> str:
        """Name to be recorded."""
        ...

    @property
    def width(self) -> int:
        """Of one token's embedding."""
        ...

    def encode(self, captions: Sequence[str], *, max_length: int) -> Sequence[np.ndarray]:
        """One (tokens, width) array per caption, in order, without padding."""
        ...

    def count_tokens(self, captions: Sequence[str], *, max_length: int) -> TokenCounts:
        """What `encode` has to do for these captions."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What is known about a complete shard (`job/SHARD.json`)."""

    records: int
    tokens: int
    num_bytes: int
    encoder: str
    width: int
    skipped: list[dict[str, str]]  # Skipped as dictionaries, in the order of the source
    unknown: int = 0  # tokens that the encoder's vocabulary lacks
    encoded: int = 0  # tokens of the distinct captions, which were encoded
    computed: int = 0  # tokens the encoder computed for them, padding included

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> "ShardReport":
        """From what `write_report` wrote.

        Raises:
          UserError: a field is missing or of another type, or a count is negative.
        """
        counts = {name: json_field(content, name, int, where) for name in _COUNTS}
        counts |= {name: json_field(content, name, int, where, default=0) for name in _LATER_COUNTS}
        if negative := [name for name, count in counts.items() if count < 0]:
            raise UserError(f"{where}: {negative[0]!r} must be at least 0, got {counts[negative[0]]}")
        encoder = json_field(content, "encoder", str, where)
        skipped = [
            json_object(item, f"{where}: skipped") for item in json_field(content, "skipped", list, where)
        ]
        for item in skipped:
            json_field(item, "reason", str, f"{where}: skipped")
        return cls(**counts, encoder=encoder, skipped=skipped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What decides about the bytes of a shard, beside its unit of the source."""

    max_length: int  # tokens
    dtype: EmbeddingDtype
    images: bool  # whether the records hold the pictures


def _report_path(out: epath.Path, shard: str) -> epath.Path:
    return out / "job" / f"{shard}.json"


def _hashes_path(out: epath.Path, shard: str) -> epath.Path:
    return out / "job" / f"{shard}.keys"


def report_files(out: epath.Path) -> list[epath.Path]:
    """The reports of all complete shards of a folder, by name; none that is being written."""
    files = [file for file in (out / "job").glob("*.json") if not file.name.startswith("incomplete.")]
    return sorted(files, key=lambda file: file.name)


def read_report(out: epath.Path, shard: str, *, images: bool) -> ShardReport | None:
    """The report of a shard; None unless the shard is complete."""
    try:
        found = ShardReport.from_json(read_json(_report_path(out, shard)), shard)
        size = int((out / shard).stat().length)
        hashed = None if images else int(_hashes_path(out, shard).stat().length)
    except (FileNotFoundError, ValueError):
        return None  # to be written again
    if size != found.num_bytes or hashed not in (None, found.records * _HASH.itemsize):
        return None
    return found


def read_key_hashes(out: epath.Path, shards: Iterable[str]) -> np.ndarray:
    """`records.key_hash` of every record of the shards, in order."""
    parts = [np.frombuffer(_hashes_path(out, shard).read_bytes(), _HASH) for shard in shards]
    return np.concatenate(parts).astype(np.uint64, copy=False)


def write_report(out: epath.Path, shard: str, report: ShardReport) -> None:
    """Says that a shard is complete."""
    content = json.dumps(dataclasses.asdict(report), ensure_ascii=False)
    write_text(_report_path(out, shard), content + "\n")


def withdraw_report(out: epath.Path, shard: str) -> None:
    """Takes `write_report` back."""
    _report_path(out, shard).unlink(missing_ok=True)


class ShardWriter:
    """Writes single shards; holds the text encoder."""

    def __init__(
        self, out: epath.Path, settings: ShardSettings, source: Source, encoder: Encoder, progress: Any
    ):
        """Opens nothing yet.

        Args:
          out: the record folder.
          settings: of all shards.
          source: where the units come from.
          encoder: the text encoder.
          progress: a tqdm bar, moved on by captions.
        """
        self._out = out
        self._settings = settings
        self._source = source
        self._encoder = encoder
        self._progress = progress

    def write(self, shard: str, unit: Any, pool: ThreadPoolExecutor) -> ShardReport:
        """Writes the shard of one unit; it counts as complete once its report is written, too."""
        skipped: list[Skipped] = []
        known: dict[str, tuple[StoredEmbedding, int]] = {}
        hashes: list[int] = []
        tokens = unknown = encoded = computed = 0
        with TFRecordWriter(self._out / shard) as writer:
            for window in _windows(self._source.read(unit)):
                examples = _usable(window, skipped, pool, pictures=self._settings.images)
                captions = [text for example in examples for text in example.captions]
                found, counts = self._embed(captions, known)
                encoded, computed = encoded + counts.useful, computed + counts.computed
                for example in examples:
                    for number, caption in enumerate(example.captions):
                        embedding, unknown_tokens = found[caption]
                        key = f"{example.key}#{number}" if number else example.key
                        record = records.Record(
                            key=key,
                            image=example.image if self._settings.images else None,
                            caption=caption,
                            text_embedding=embedding.values,
                            text_embedding_scale=embedding.scale,
                        )
                        writer.write(records.serialize(record))
                        hashes.append(records.key_hash(key))
                        tokens += len(embedding.values)
                        unknown += unknown_tokens
        if not self._settings.images:
            with AtomicFile(_hashes_path(self._out, shard)) as file:
                file.write(np.array(hashes, _HASH).tobytes())
        return ShardReport(
            records=writer.num_records,
            tokens=tokens,
            num_bytes=writer.num_bytes,
            encoder=self._encoder.name,
            width=self._encoder.width,
            skipped=[dataclasses.asdict(item) for item in skipped],
            unknown=unknown,
            encoded=encoded,
            computed=computed,
        )

    def _embed(
        self, captions: Sequence[str], known: dict[str, tuple[StoredEmbedding, int]]
    ) -> tuple[dict[str, tuple[StoredEmbedding, int]], TokenCounts]:
        """Embeddings and unknown tokens of a window's captions; those seen before come from `known`."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        found = {caption: known[caption] for caption in captions if caption in known}
        counts = TokenCounts(unknown=(), useful=0, computed=0)
        if new:
            counts = self._encoder.count_tokens(new, max_length=self._settings.max_length)
            for caption, embedding, unknown in zip(new, self._encode(new), counts.unknown, strict=True):
                found[caption] = (embedding, unknown)
        remembered = sum(embedding.nbytes for embedding, _ in known.values())
        for caption in new:
            remembered += found[caption][0].nbytes
            if remembered > MEMORY:
                break
            known[caption] = found[caption]
        self._progress.update(len(captions))
        return found, counts

    def _encode(self, captions: list[str]) -> Iterator[StoredEmbedding]:
        """Calls the encoder and checks what it returns."""
        embeddings = self._encoder.encode(captions, max_length=self._settings.max_length)
        for caption, embedding in zip(captions, embeddings, strict=True):
            if embedding.ndim != 2 or embedding.shape[1] != self._encoder.width:
                raise ValueError(f"text embedding of shape {embedding.shape}, width {self._encoder.width}")
            try:
                yield pack(np.asarray(embedding), self._settings.dtype)
            except ValueError as error:
                raise UserError(
                    f"--text_encoder: {self._encoder.name!r} fails on the caption {caption!r}: {error}"
                ) from error


def _windows(samples: Iterable[Example | Skipped]) -> Iterator[list[Example | Skipped]]:
    """Consecutive runs of at most `WINDOW` samples."""
    iterator = iter(samples)
    while window := list(itertools.islice(iterator, WINDOW)):
        yield window


def _usable(
    window: Sequence[Example | Skipped], skipped: list[Skipped], pool: ThreadPoolExecutor, *, pictures: bool
) -> list[Example]:
    """The examples whose picture decodes, if it matters; the others go to `skipped`, all in order."""
    faults = pool.map(
        lambda sample: picture_fault(sample.image) if pictures and isinstance(sample, Example) else None,
        window,
    )
    examples = []
    for sample, fault in zip(window, faults):
        if isinstance(sample, Skipped):
            skipped.append(sample)
        elif fault is not None:
            skipped.append(
                Skipped(file=sample.file, key=sample.key, reason="undecodable picture", detail=fault)
            )
        else:
            examples.append(sample)
    return examples
