"""The job that encodes the captions of a source once and stores them with the pictures as records.

A job is a row of shards. Each shard is a pure function of the source and the configuration, so that a
restart, which skips the complete ones, ends with the same bytes. Beside the records the folder holds
`job.json` (the resolved configuration, written first), `job/` (one small file per complete shard),
`skipped.jsonl` (what could not be used) and, written last, TFDS's metadata.
"""

import dataclasses
import enum
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import BFloat16
from tqdm import tqdm

from imagen_jax.data import records
from imagen_jax.data.examples import Example, Skipped, Source
from imagen_jax.data.files import make_folder, write_text
from imagen_jax.data.pictures import picture_fault
from imagen_jax.data.sources import open_source
from imagen_jax.data.tfrecord import TFRecordWriter
from imagen_jax.errors import UserError

_WINDOW = 1024  # samples held in memory with their pictures; their new captions are encoded together
_MEMORY = 2**30  # bytes of embeddings remembered per shard, for captions that occur again
_PICTURE_THREADS = 8  # that check pictures


class EmbeddingDtype(enum.Enum):
    """How text embeddings are stored."""

    BFLOAT16 = "bfloat16"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """One run of the job.

    Raises:
      UserError: a value is out of range.
    """

    source: str  # SPEC of the captioned pictures
    text_encoder: str  # folder or hub id
    out: str  # record folder, local or cloud
    split: str = "train"  # name of the split; a folder may hold several, made one after the other
    max_length: int = 128  # tokens; longer captions are cut off
    dtype: EmbeddingDtype = EmbeddingDtype.BFLOAT16  # of the stored embeddings
    num_shards: int | None = None  # files; None: by the size of the source, about 1000 pictures each
    name: str = "captions"  # of the data set: the first part of the file names
    limit: int | None = None  # samples; None: all

    def __post_init__(self):
        """Checks the values."""
        if self.max_length < 1:
            raise UserError(f"--max_length: must be at least 1, got {self.max_length}")
        if self.num_shards is not None and not 1 <= self.num_shards <= 99_999:
            raise UserError(f"--num_shards: must be from 1 to 99999, got {self.num_shards}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(f"--name: wants lower-case letters, digits and _, got {self.name!r}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.split):
            raise UserError(f"--split: wants lower-case letters, digits and _, got {self.split!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a split of a record folder holds, and how fast this run was."""

    captions: int  # records
    tokens: int  # of all captions
    skipped: Mapping[str, int]  # samples by reason
    num_shards: int
    num_bytes: int  # of all shards
    written: int  # captions written by this run, the others were there
    seconds: float  # wall time of writing them

    @property
    def captions_per_second(self) -> float:
        """Captions written by this run per second; 0 if there was nothing left to write."""
        return self.written / self.seconds if self.written else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ShardReport:
    """What is known about a complete shard (`job/SHARD.json`)."""

    records: int
    tokens: int
    num_bytes: int
    encoder: str
    width: int
    skipped: list[dict[str, str]]  # Skipped as dictionaries, in the order of the source


def _job_description(config: PrecomputeConfig, source: Source, num_shards: int) -> dict[str, Any]:
    """What decides about the bytes of a split; the keys are flags, in the order of comparison.

    The fingerprint comes before the number of shards, which changes with a source that has grown.
    """
    return {
        "name": config.name,
        "text_encoder": config.text_encoder.rstrip("/"),
        "max_length": config.max_length,
        "dtype": config.dtype.value,
        "split": {
            "source": config.source,
            "limit": config.limit,
            "fingerprint": source.fingerprint(),
            "num_shards": num_shards,
        },
    }


def _claim_folder(out: epath.Path, split: str, job: dict[str, Any]) -> None:
    """Writes job.json, or checks that the one that is there says the same.

    Until a first shard is complete nothing is lost by another configuration, and it may replace the old one.

    Raises:
      UserError: the folder belongs to a different job; names the first flag that differs.
    """
    path = out / "job.json"
    shared = {key: value for key, value in job.items() if key != "split"}
    splits: dict[str, Any] = {}
    if any((out / "job").glob("*.json")):
        try:
            there = json.loads(path.read_text())
            splits = there.pop("splits")
            old = {**there, **splits.get(split, job["split"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a job description ({error}); use another --out") from error
        for key, value in {**shared, **job["split"]}.items():
            if old.get(key) != value:
                what = f"--{key} was {old.get(key)!r}, now {value!r}"
                if key == "fingerprint":
                    what = f"the files of --source {job['split']['source']!r} have changed"
                raise UserError(f"--out: {out} holds a different job: {what}; use another --out")
    elif (out / "dataset_info.json").exists():
        raise UserError(f"--out: {out} holds a data set of another origin; use another --out")
    splits[split] = job["split"]
    text = json.dumps({**shared, "splits": splits}, indent=2, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


class _ShardWriter:
    """Writes single shards; holds the text encoder."""

    def __init__(self, config: PrecomputeConfig, source: Source, encoder: Encoder, progress: Any):
        self._config = config
        self._source = source
        self._encoder = encoder
        self._progress = progress

    def write(self, path: epath.Path, unit: Any, pool: ThreadPoolExecutor) -> _ShardReport:
        """Writes the shard of one unit."""
        skipped: list[Skipped] = []
        known: dict[str, np.ndarray] = {}
        tokens = 0
        with TFRecordWriter(path) as writer:
            for window in _windows(self._source.read(unit)):
                examples = _usable(window, skipped, pool)
                embeddings = self._embed([text for example in examples for text in example.captions], known)
                for example in examples:
                    for number, caption in enumerate(example.captions):
                        embedding = embeddings[caption]
                        key = f"{example.key}#{number}" if number else example.key
                        record = records.Record(
                            key=key, image=example.image, caption=caption, text_embedding=embedding
                        )
                        writer.write(records.serialize(record))
                        tokens += len(embedding)
        return _ShardReport(
            records=writer.num_records,
            tokens=tokens,
            num_bytes=writer.num_bytes,
            encoder=self._encoder.name,
            width=self._encoder.width,
            skipped=[dataclasses.asdict(item) for item in skipped],
        )

    def _embed(
        self, captions: Sequence[str], known: dict[str, np.ndarray]
    ) -> dict[str, BFloat16[np.ndarray, "_tokens _width"]]:
        """Embeddings of a window's captions; those that the shard has seen come from `known`."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        found = {caption: known[caption] for caption in captions if caption in known}
        if new:
            for caption, embedding in zip(new, self._encode(new), strict=True):
                found[caption] = embedding
        remembered = sum(embedding.nbytes for embedding in known.values())
        for caption in new:
            remembered += found[caption].nbytes
            if remembered > _MEMORY:
                break
            known[caption] = found[caption]
        self._progress.update(len(captions))
        return found

    def _encode(self, captions: list[str]) -> Iterator[np.ndarray]:
        """Calls the encoder and checks what it returns."""
        for embedding in self._encoder.encode(captions, max_length=self._config.max_length):
            if embedding.ndim != 2 or embedding.shape[1] != self._encoder.width:
                raise ValueError(f"text embedding of shape {embedding.shape}, width {self._encoder.width}")
            yield np.asarray(embedding).astype(ml_dtypes.bfloat16)


def _windows(samples: Iterable[Example | Skipped]) -> Iterator[list[Example | Skipped]]:
    """Consecutive runs of at most `_WINDOW` samples."""
    iterator = iter(samples)
    while window := list(itertools.islice(iterator, _WINDOW)):
        yield window


def _usable(
    window: Sequence[Example | Skipped], skipped: list[Skipped], pool: ThreadPoolExecutor
) -> list[Example]:
    """The examples whose picture decodes; the others are appended to `skipped`, all in order."""
    faults = pool.map(
        lambda sample: picture_fault(sample.image) if isinstance(sample, Example) else None, window
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


def _read_report(out: epath.Path, shard: str) -> _ShardReport | None:
    """The report of a shard; None unless the shard is complete."""
    report = out / "job" / f"{shard}.json"
    try:
        found = _ShardReport(**json.loads(report.read_text()))
        size = int((out / shard).stat().length)
    except (FileNotFoundError, ValueError, TypeError):
        return None  # to be written again
    return found if size == found.num_bytes else None


def _load_encoder(name: str) -> Encoder:
    """Loads the text encoder; imported late, because a complete folder needs none of it."""
    from imagen_jax.text.encoder import TextEncoder

    return TextEncoder.load(name)


def _write_missing(
    config: PrecomputeConfig,
    source: Source,
    units: Sequence[Any],
    reports: list[_ShardReport | None],
    encoder: Encoder | None,
) -> list[_ShardReport]:
    """Writes the shards that have no report yet; returns the reports of all."""
    out = epath.Path(config.out).expanduser()
    done = [report for report in reports if report is not None]
    if len(done) == len(units):
        return done
    encoder = encoder or _load_encoder(config.text_encoder)
    for report in done:
        if (report.encoder, report.width) != (encoder.name, encoder.width):
            raise UserError(
                f"--text_encoder: {encoder.name!r} of width {encoder.width} is not what the shards in {out} "
                f"were made with ({report.encoder!r} of width {report.width}); use another --out"
            )
    total = None if source.size is None else max(source.size, sum(report.records for report in done))
    with (
        tqdm(total=total, initial=sum(report.records for report in done), unit="caption") as progress,
        ThreadPoolExecutor(_PICTURE_THREADS) as pool,
    ):
        writer = _ShardWriter(config, source, encoder, progress)
        for number, unit in enumerate(units):
            if reports[number] is not None:
                continue
            shard = records.shard_name(config.name, config.split, number, len(units))
            report = writer.write(out / shard, unit, pool)
            content = json.dumps(dataclasses.asdict(report), ensure_ascii=False)
            write_text(out / "job" / f"{shard}.json", content + "\n")
            reports[number] = report
            done.append(report)
            # Few sources know their size before they are read; the shards are about equal.
            progress.total = round(sum(report.records for report in done) / len(done) * len(units))
    return [report for report in reports if report is not None]


def _write_skipped(out: epath.Path) -> None:
    """Collects what the shards of all splits skipped into `skipped.jsonl`, in order."""
    files = sorted((out / "job").glob("*.json"), key=os.fspath)
    skipped = [item for file in files for item in json.loads(file.read_text())["skipped"]]
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in skipped]
    write_text(out / "skipped.jsonl", "".join(lines))


def _write_info(config: PrecomputeConfig, reports: Sequence[_ShardReport]) -> None:
    """Writes the metadata of this split and of those that were complete before."""
    out = epath.Path(config.out).expanduser()
    splits: dict[str, records.SplitInfo] = {}
    sources: dict[str, str] = {}
    if (out / "dataset_info.json").exists():
        before = records.read_folder_info(out)
        splits.update(before.splits)
        sources.update(before.encoder.source)
    splits[config.split] = records.SplitInfo(
        name=config.split,
        shard_lengths=tuple(report.records for report in reports),
        num_bytes=sum(report.num_bytes for report in reports),
    )
    sources[config.split] = config.source
    encoder = records.EncoderInfo(
        text_encoder=config.text_encoder,
        width=reports[0].width,
        max_length=config.max_length,
        dtype=config.dtype.value,
        source=sources,
    )
    records.write_folder_info(records.FolderInfo(path=out, name=config.name, splits=splits, encoder=encoder))


def source_captions(config: PrecomputeConfig) -> Iterator[str]:
    """All captions of the job's source, to make a vocabulary of."""
    source = open_source(config.source, split=config.split, limit=config.limit)
    for unit in source.units(config.num_shards):
        for example in source.read(unit):
            if isinstance(example, Example):
                yield from example.captions


def precompute(config: PrecomputeConfig, *, encoder: Encoder | None = None) -> Summary:
    """Runs the job, or finishes it where an earlier run stopped.

    Args:
      config: what to do.
      encoder: the text encoder; None: `config.text_encoder` is loaded, if there is anything to encode.

    Returns:
      what the split now holds.

    Raises:
      UserError: the source cannot be opened, `out` holds a different job, the disk is full, or nothing in
        the source is usable.
    """
    source = open_source(config.source, split=config.split, limit=config.limit)
    units = source.units(config.num_shards)
    out = make_folder(config.out)
    _claim_folder(out, config.split, _job_description(config, source, len(units)))
    make_folder(out / "job")
    shards = [records.shard_name(config.name, config.split, i, len(units)) for i in range(len(units))]
    before = [_read_report(out, shard) for shard in shards]
    there = sum(report.records for report in before if report is not None)
    start = time.monotonic()
    reports = _write_missing(config, source, units, before, encoder)
    seconds = time.monotonic() - start
    _write_skipped(out)
    skipped = Counter(item["reason"] for report in reports for item in report.skipped)
    captions = sum(report.records for report in reports)
    if not captions:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        raise UserError(
            f"--source: {config.source!r} has no usable sample ({reasons or 'it is empty'}); "
            f"{out / 'skipped.jsonl'} lists them"
        )
    _write_info(config, reports)
    return Summary(
        captions=captions,
        tokens=sum(report.tokens for report in reports),
        skipped=dict(skipped),
        num_shards=len(reports),
        num_bytes=sum(report.num_bytes for report in reports),
        written=captions - there,
        seconds=seconds,
    )
