"""Single shards of the embedding job: what one holds, how it is written, and its report.

A shard is a pure function of its unit of the source and of the job's description: its captions are
batched among themselves, so that neither other shards nor other processes change a byte.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath

from imagen_jax.data import records
from imagen_jax.data.encoder_identity import EncoderIdentity, identity_from_json
from imagen_jax.data.examples import (
    Example,
    Skipped,
    Source,
    UnusableError,
    attempt,
    clean_captions,
    is_lfs_pointer,
)
from imagen_jax.data.picture_kinds import lacks_heif
from imagen_jax.data.pictures import picture_fault, shorter_side
from imagen_jax.data.tfrecord import TFRecordWriter
from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, json_field, json_object, read_json
from imagen_jax.text.store import EmbeddingDtype, StoredEmbedding, TokenCounts, pack

WINDOW = 1024  # samples held in memory with their pictures; their new captions are encoded together
MEMORY = 2**30  # bytes of embeddings remembered per shard, for captions that occur again
_HASH = np.dtype("<u8")
# Fields of `ShardReport`: those that every report has, and those that the first versions did not write.
_COUNTS = ("records", "tokens", "num_bytes", "width")
_LATER_COUNTS = ("unknown", "encoded", "computed", "cut")


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

    @property
    def identity(self) -> EncoderIdentity:
        """What tells it from other encoders, whatever its name."""
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
    identity: EncoderIdentity | None = None  # what the encoder does; None: not known
    cut: int = 0  # records whose caption has more tokens than are stored
    samples: int | None = None  # that the source gave: used or skipped; None: not counted when it was made

    @classmethod
    def read(cls, path: epath.Path) -> "ShardReport":
        """Reads what `write_report` wrote.

        Raises:
          UserError: it is missing, or a field is, or is of another type, or a count is negative.
        """
        content, where = read_json(path), path.name
        counts = {name: json_field(content, name, int, where) for name in _COUNTS}
        counts |= {name: json_field(content, name, int, where, default=0) for name in _LATER_COUNTS}
        if content.get("samples") is not None:
            counts["samples"] = json_field(content, "samples", int, where)
        if negative := [name for name, count in counts.items() if count < 0]:
            raise UserError(f"{where}: {negative[0]!r} must be at least 0, got {counts[negative[0]]}")
        encoder = json_field(content, "encoder", str, where)
        skipped = [
            json_object(item, f"{where}: skipped") for item in json_field(content, "skipped", list, where)
        ]
        for item in skipped:
            json_field(item, "reason", str, f"{where}: skipped")
        identity = identity_from_json(content.get("identity"), f"{where}: identity")
        return cls(**counts, encoder=encoder, skipped=skipped, identity=identity)


class _Embedded(NamedTuple):
    """What a shard needs of a caption."""

    stored: StoredEmbedding
    unknown: int  # tokens that the encoder's vocabulary lacks
    cut: bool  # whether it has more tokens than are stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What decides about the bytes of a shard, beside its unit of the source."""

    max_length: int  # tokens
    dtype: EmbeddingDtype
    images: bool  # whether the records hold the pictures
    min_side: int | None = None  # pixels; pictures whose shorter side is smaller are left out


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
        found = ShardReport.read(_report_path(out, shard))
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
    records.write_shared(_report_path(out, shard), lambda: [f"{content}\n".encode()])


def withdraw_report(out: epath.Path, shard: str) -> None:
    """Takes `write_report` back."""
    _report_path(out, shard).unlink(missing_ok=True)


class ShardWriter:
    """Writes single shards; holds the text encoder."""

    def __init__(
        self,
        out: epath.Path,
        settings: ShardSettings,
        source: Source,
        encoder: Encoder,
        progress: Any,
        *,
        tag: str = "",
    ):
        """Opens nothing yet.

        Args:
          out: the record folder.
          settings: of all shards.
          source: where the units come from.
          encoder: the text encoder.
          progress: a tqdm bar, moved on by captions.
          tag: of this process's temporary files.
        """
        self._out = out
        self._settings = settings
        self._source = source
        self._encoder = encoder
        self._progress = progress
        self._tag = tag

    def write(self, shard: str, unit: Any, pool: ThreadPoolExecutor) -> ShardReport:
        """Writes the shard of one unit; it counts as complete once its report is written, too."""
        skipped: list[Skipped] = []
        known: dict[str, _Embedded] = {}
        hashes: list[int] = []
        tokens = unknown = encoded = computed = cut = samples = used = 0
        with TFRecordWriter(self._out / shard, tag=self._tag) as writer:
            for window in _windows(self._source.read(unit)):
                examples = _usable(window, skipped, pool, self._settings)
                samples, used = samples + len(window), used + len(examples)
                captions = [text for example in examples for text in example.captions]
                found, counts = self._embed(captions, known)
                encoded, computed = encoded + counts.useful, computed + counts.computed
                for example in examples:
                    for number, caption in enumerate(example.captions):
                        embedding = found[caption].stored
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
                        unknown += found[caption].unknown
                        cut += found[caption].cut
        if samples != used + len(skipped) or writer.num_records < used:
            raise RuntimeError(
                f"{shard}: of {samples} samples {used} were used ({writer.num_records} records) "
                f"and {len(skipped)} skipped"
            )
        if not self._settings.images:
            with AtomicFile(_hashes_path(self._out, shard), tag=self._tag) as file:
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
            cut=cut,
            identity=self._encoder.identity,
            samples=samples,
        )

    def _embed(
        self, captions: Sequence[str], known: dict[str, _Embedded]
    ) -> tuple[dict[str, _Embedded], TokenCounts]:
        """Embeddings of a window's captions, and what they took; those seen before come from `known`."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        found = {caption: known[caption] for caption in captions if caption in known}
        counts = TokenCounts(unknown=(), useful=0, computed=0)
        if new:
            counts = self._encoder.count_tokens(new, max_length=self._settings.max_length)
            cut = counts.cut or (False,) * len(new)
            for caption, stored, unknown, is_cut in zip(
                new, self._encode(new), counts.unknown, cut, strict=True
            ):
                found[caption] = _Embedded(stored=stored, unknown=unknown, cut=is_cut)
        remembered = sum(each.stored.nbytes for each in known.values())
        for caption in new:
            remembered += found[caption].stored.nbytes
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


def _checked(sample: Example, settings: ShardSettings) -> Example:
    """The sample, if it can become records.

    Raises:
      UnusableError: it has no caption or one that no file can hold, or, if it matters, its picture does not decode.
    """
    captions = clean_captions(sample.captions)
    if not captions:
        raise UnusableError("no caption")
    if settings.images:
        fault = picture_fault(sample.image)
        if fault is not None and is_lfs_pointer(sample.image):
            raise UnusableError("Git LFS pointer in place of a picture", "git lfs pull fetches the files")
        if fault is not None and lacks_heif(sample.image):
            raise UnusableError("HEIC picture", "pip install 'imagen_jax[heif]' lets it be read")
        if fault is not None:
            raise UnusableError("undecodable picture", fault)
        if settings.min_side is not None and (side := shorter_side(sample.image)) < settings.min_side:
            raise UnusableError("smaller than --min_side", f"{side} pixels")
    return dataclasses.replace(sample, captions=captions)


def _checked_or_skipped(sample: Example | Skipped, *, settings: ShardSettings) -> Example | Skipped:
    """The sample if it is skipped already or passes `_checked`; else the skip that says why not."""
    if isinstance(sample, Skipped):
        return sample
    return attempt(functools.partial(_checked, sample, settings), file=sample.file, key=sample.key)


def _usable(
    window: Sequence[Example | Skipped],
    skipped: list[Skipped],
    pool: ThreadPoolExecutor,
    settings: ShardSettings,
) -> list[Example]:
    """The examples that can become records; the others go to `skipped`, all in order."""
    checked = list(pool.map(functools.partial(_checked_or_skipped, settings=settings), window))
    skipped += [sample for sample in checked if isinstance(sample, Skipped)]
    return [sample for sample in checked if isinstance(sample, Example)]
