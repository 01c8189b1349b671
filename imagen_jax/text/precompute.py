"""The job that encodes the captions of a source once and stores them with the pictures as records.

A job is a row of shards. Each shard is a pure function of the source and the configuration, so that a
restart, which skips the complete ones, ends with the same bytes, and so that several processes may share
the shards. Beside the records the folder holds `job.json` (the resolved configuration, written first),
`job/` (small files per complete shard) and, written by whichever process finds all shards complete,
`skipped.jsonl` (what could not be used) and TFDS's metadata.
"""

import dataclasses
import functools
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from tqdm import tqdm

from imagen_jax.data import records
from imagen_jax.data.encoder_identity import EncoderIdentity, check_same_encoder, warn_unknown_encoder
from imagen_jax.data.examples import Example, Source
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UnknownTokensWarning, UserError
from imagen_jax.files import make_folder, path_from
from imagen_jax.limits import MAX_COUNT, MAX_NAME, MAX_PROCESSES, MAX_SIDE, MAX_TEXT_LENGTH, shown
from imagen_jax.lock import FolderLock
from imagen_jax.text import job_folder, shards
from imagen_jax.text.shards import Encoder, ShardReport, ShardWriter
from imagen_jax.text.store import BLOCK_SIZE, WHOLE_LENGTH, EmbeddingDtype
from imagen_jax.text.summary import Summary

_PICTURE_THREADS = 8  # that check pictures
_MAX_UNKNOWN = 0.05  # share of unknown tokens above which captions and encoder do not fit each other


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
    max_length: int = 128  # tokens; longer captions are cut (`cut_embedding`)
    dtype: EmbeddingDtype = EmbeddingDtype.BFLOAT16  # of the stored embeddings
    num_shards: int | None = None  # files; None: by the size of the source, about 1000 pictures each
    name: str = "captions"  # of the data set: the first part of the file names
    limit: int | None = None  # samples; None: all
    min_side: int | None = None  # pixels; pictures whose shorter side is smaller are left out; None: none is
    embeddings_only: bool = False  # leave the pictures out, to be joined by key to those of another folder
    num_processes: int = 1  # that share the job
    process_index: int = 0  # of this one, from 0; it writes every num_processes-th shard

    def __post_init__(self):
        """Checks the values."""
        if self.max_length < 1:
            raise UserError(f"--max_length: must be at least 1, got {self.max_length}")
        if self.max_length > WHOLE_LENGTH:
            raise UserError(
                f"--max_length: the text encoder sees at most {WHOLE_LENGTH} tokens, got {self.max_length}"
            )
        if self.num_shards is not None and not 1 <= self.num_shards <= 99_999:
            raise UserError(f"--num_shards: must be from 1 to 99999, got {self.num_shards}")
        if self.min_side is not None and self.min_side < 1:
            raise UserError(f"--min_side: must be at least 1, got {self.min_side}")
        if self.min_side is not None and self.embeddings_only:
            raise UserError("--min_side: pictures are not looked at with --embeddings_only")
        for flag, text in (("name", self.name), ("split", self.split)):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", text) or len(text) > MAX_NAME:  # parts of files' names
                raise UserError(
                    f"--{flag}: wants lower-case letters, digits and _, at most {MAX_NAME}, got {shown(text)}"
                )
        for flag, most in (
            ("max_length", MAX_TEXT_LENGTH),
            ("num_processes", MAX_PROCESSES),
            ("limit", MAX_COUNT),
            ("min_side", MAX_SIDE),
        ):
            if (value := getattr(self, flag)) is not None and value > most:
                raise UserError(f"--{flag}: must be at most {most}, got {shown(value)}")
        if self.num_processes < 1:
            raise UserError(f"--num_processes: must be at least 1, got {self.num_processes}")
        if not 0 <= self.process_index < self.num_processes:
            raise UserError(
                f"--process_index: must be from 0 to {self.num_processes - 1}, got {self.process_index}"
            )


def _job_description(config: PrecomputeConfig, source: Source, num_shards: int) -> dict[str, Any]:
    """What decides about the bytes of a split; the keys are flags, in the order of comparison.

    The fingerprint comes before the number of shards, which changes with a source that has grown.
    """
    return {
        "name": config.name,
        "text_encoder": config.text_encoder.rstrip("/"),
        "max_length": config.max_length,
        "dtype": config.dtype.value,
        "embeddings_only": config.embeddings_only,
        "split": {
            "source": config.source,
            "limit": config.limit,
            "min_side": config.min_side,
            "fingerprint": source.fingerprint(),
            "num_shards": num_shards,
        },
    }


def _load_encoder(name: str) -> Encoder:
    """Loads the text encoder; imported late, because a complete folder needs none of it.

    All accelerators of this process work on it: each with a copy, or all with one where a copy does not fit.
    """
    import jax
    import numpy as np

    from imagen_jax.text.encoder import TextEncoder

    devices = jax.local_devices()
    if len(devices) > 1 and devices[0].platform != "cpu":
        mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
        return TextEncoder.load(name, mesh=mesh, progress=True)
    return TextEncoder.load(name, progress=True)


class _Job:
    """One split of one folder, as one of its processes sees it."""

    def __init__(self, config: PrecomputeConfig, source: Source, encoder: Encoder | None = None):
        self.config = config
        self._given = encoder
        self.source = source
        self.units = source.units(config.num_shards)
        self.out = epath.Path(config.out).expanduser()
        self.description = _job_description(config, source, len(self.units))
        count = len(self.units)
        self.shards = [records.shard_name(config.name, config.split, i, count) for i in range(count)]
        self._warned = False

    @property
    def _numbers(self) -> range:
        """The shards of this process."""
        return range(self.config.process_index, len(self.units), self.config.num_processes)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The text encoder, loaded when it is first asked for."""
        return self._given or _load_encoder(self.config.text_encoder)

    def claim(self) -> None:
        """Takes the folder for this job.

        Raises:
          UserError: it belongs to a different job.
        """
        name = job_folder.encoder_name(self.out)
        if name not in (None, self.description["text_encoder"]):
            # One encoder may be had under several names: a hub id, copies in folders.
            renamed = {**self.description, "text_encoder": name}
            job_folder.check_job(self.out, self.config.split, renamed)
            there = job_folder.encoder_identities(self.out)
            if all(each is not None and not self.encoder.identity.differences(each) for each in there):
                self.description = renamed
        job_folder.claim_folder(self.out, self.config.split, self.description)
        make_folder(self.out / "job")

    def open_encoder(self) -> None:
        """Opens the text encoder of a job that has not begun: a wrong name leaves no folder behind.

        A process without shards needs none.

        Raises:
          UserError: there is no such encoder.
        """
        if self._numbers and not (self.out / "job.json").exists():
            self.encoder  # noqa: B018

    def _check_encoder(self, done: Sequence[ShardReport]) -> None:
        """Refuses to add another encoder's embeddings to those of complete shards, of other splits too."""
        encoder = self.encoder
        for report in done:
            named = (report.encoder, report.width) == (encoder.name, encoder.width)
            if not named and (report.identity is None or report.width != encoder.width):
                raise UserError(
                    f"--text_encoder: {encoder.name!r} of width {encoder.width} is not what the shards in "
                    f"{self.out} were made with ({report.encoder!r} of width {report.width}); "
                    "use another --out"
                )
        there = [*(report.identity for report in done), *job_folder.encoder_identities(self.out)]
        for identity in dict.fromkeys(there):
            check_same_encoder(
                identity,
                encoder.identity,
                f"--text_encoder: {self.config.text_encoder!r} is not the encoder that the shards in {self.out} "
                "were made with",
                "; use another --out",
            )
        if None in there:
            warn_unknown_encoder(f"complete shards in {self.out} do")

    def report(self, number: int) -> ShardReport | None:
        """The report of a shard; None unless it is complete."""
        return shards.read_report(self.out, self.shards[number], images=not self.config.embeddings_only)

    def warn_of_unknown(self, reports: Sequence[ShardReport]) -> None:
        """Warns once if the encoder does not know the captions' language."""
        tokens = sum(report.tokens for report in reports)
        unknown = sum(report.unknown for report in reports)
        if self._warned or unknown <= _MAX_UNKNOWN * tokens:
            return
        self._warned = True
        warnings.warn(
            f"{unknown / tokens:.1%} of the captions' tokens are unknown to the text encoder "
            f"{self.config.text_encoder!r}; use one that knows their language",
            UnknownTokensWarning,
            stacklevel=4,
        )

    def write_missing(self, reports: list[ShardReport | None]) -> int:
        """Writes this process's shards that have no report yet, adds theirs; returns their captions."""
        config = self.config
        self.warn_of_unknown([report for report in reports if report is not None])
        if all(reports[number] is not None for number in self._numbers):
            return 0
        process = f"{config.process_index}-of-{config.num_processes}"
        name = job_folder.lock_name(config.split, process)
        what = "run" if config.num_processes == 1 else f"run of --process_index={config.process_index}"
        with FolderLock(self.out, flag="--out", name=name, what=what, remove=True):
            # Until it let go, another run may have written them.
            reports[:] = [self.report(number) for number in range(len(self.units))]
            missing = [number for number in self._numbers if reports[number] is None]
            return self._write(missing, reports, process) if missing else 0

    def _write(
        self,
        missing: Sequence[int],
        reports: list[ShardReport | None],
        process: str,
    ) -> int:
        """Writes the missing ones of this process's shards; the lock is held."""
        config, mine = self.config, self._numbers
        done = [report for report in reports if report is not None]
        self._check_encoder(done)
        settings = shards.ShardSettings(
            max_length=config.max_length,
            dtype=config.dtype,
            images=not config.embeddings_only,
            min_side=config.min_side,
        )
        written = 0
        with (
            tqdm(total=None if len(mine) < len(self.units) else self.source.size, unit="caption") as progress,
            ThreadPoolExecutor(_PICTURE_THREADS) as pool,
        ):
            progress.update(sum(there.records for i in mine if (there := reports[i]) is not None))
            writer = ShardWriter(self.out, settings, self.source, self.encoder, progress, tag=process)
            for number in missing:
                report = writer.write(self.shards[number], self.units[number], pool)
                shards.write_report(self.out, self.shards[number], report)
                try:
                    job_folder.still_ours(self.out, config.split, self.description)
                except UserError:
                    shards.withdraw_report(self.out, self.shards[number])
                    raise
                reports[number] = report
                done.append(report)
                written += report.records
                self.warn_of_unknown(done)
                # Few sources know their size before they are read; the shards are about equal.
                progress.total = round(sum(report.records for report in done) / len(done) * len(mine))
        return written

    def finish(self, reports: Sequence[ShardReport]) -> None:
        """Writes what describes the complete split; several processes may do so at once.

        Raises:
          UserError: nothing in the source is usable, or two records to be joined by key have the same.
        """
        config, out = self.config, self.out
        job_folder.write_skipped(out)
        samples = _samples(reports)
        if None not in (samples, self.source.size) and samples != self.source.size:
            raise RuntimeError(
                f"the source has {self.source.size} samples, of which {samples} came out of it"
            )
        if not sum(report.records for report in reports):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in _skipped(reports).most_common())
            raise UserError(
                f"--source: {config.source!r} has no usable sample ({reasons or 'it is empty'}); "
                f"{out / 'skipped.jsonl'} lists them"
            )
        if config.embeddings_only:
            job_folder.write_key_index(out, config.split, self.shards, reports)
        split = records.SplitInfo(
            name=config.split,
            shard_lengths=tuple(report.records for report in reports),
            num_bytes=sum(report.num_bytes for report in reports),
        )
        encoder = records.EncoderInfo(
            text_encoder=config.text_encoder,
            width=reports[0].width,
            max_length=config.max_length,
            dtype=config.dtype.value,
            source={config.split: config.source},
            block_size=BLOCK_SIZE if config.dtype is EmbeddingDtype.INT8 else None,
            images=not config.embeddings_only,
            identity=self._identity(reports),
            encoder_path=self._encoder_path(),
        )
        job_folder.write_info(
            records.FolderInfo(path=out, name=config.name, splits={config.split: split}, encoder=encoder)
        )
        job_folder.remove_leftovers(out, config.split)

    def _encoder_path(self) -> str:
        """A local text encoder as it is seen from the record folder; "" for others."""
        local = epath.Path(self.config.text_encoder).is_dir()
        return (path_from(self.out, self.config.text_encoder) or "") if local else ""

    def _identity(self, reports: Sequence[ShardReport]) -> EncoderIdentity | None:
        """Of the encoder that made all of the split's shards; None where no report knows it.

        Raises:
          UserError: several encoders did, in processes that did not see each other's shards.
        """
        known = [
            (shard, each.identity) for shard, each in zip(self.shards, reports, strict=True) if each.identity
        ]
        for shard, identity in known:
            check_same_encoder(
                known[0][1],
                identity,
                f"--text_encoder: in {self.out} the shards {known[0][0]} and {shard} were made with different "
                "encoders",
                "; use another --out",
            )
        return known[0][1] if known else None


def _skipped(reports: Sequence[ShardReport]) -> Counter[str]:
    """Samples left out, by reason."""
    return Counter(item["reason"] for report in reports for item in report.skipped)


def _samples(reports: Sequence[ShardReport]) -> int | None:
    """Samples of all shards; None if one was made without counting them."""
    counts = [report.samples for report in reports if report.samples is not None]
    return sum(counts) if len(counts) == len(reports) else None


def source_captions(config: PrecomputeConfig) -> Iterator[str]:
    """All captions of the job's source, to make a vocabulary of."""
    source = open_source(config.source, split=config.split, limit=config.limit)
    for unit in source.units(config.num_shards):
        for example in source.read(unit):
            if isinstance(example, Example):
                yield from example.captions


def precompute(config: PrecomputeConfig, *, encoder: Encoder | None = None) -> Summary:
    """Runs this process's part of the job, or finishes it where an earlier run stopped.

    Args:
      config: what to do.
      encoder: the text encoder; None: `config.text_encoder` is loaded, if there is anything to encode.

    Returns:
      what the split now holds; incomplete if shards of other processes are.

    Raises:
      UserError: the source cannot be opened, `out` holds a different job, the disk is full, or nothing in
        the source is usable.
    """
    source = open_source(config.source, split=config.split, limit=config.limit)
    job = _Job(config, source, encoder)
    job.open_encoder()
    make_folder(job.out)
    job.claim()
    reports = [job.report(number) for number in range(len(job.units))]
    start = time.monotonic()
    written = job.write_missing(reports)
    seconds = time.monotonic() - start
    # Whoever is last to write a report finds all of them here.
    for number, report in enumerate(reports):
        if report is None:
            reports[number] = job.report(number)
    done = [report for report in reports if report is not None]
    job.warn_of_unknown(done)
    if len(done) == len(reports):
        job.finish(done)
    return Summary(
        captions=sum(report.records for report in done),
        tokens=sum(report.tokens for report in done),
        unknown=sum(report.unknown for report in done),
        cut=sum(report.cut for report in done),
        encoded=sum(report.encoded for report in done),
        computed=sum(report.computed for report in done),
        skipped=dict(_skipped(done)),
        samples=_samples(done),
        num_shards=len(reports),
        num_complete=len(done),
        num_bytes=sum(report.num_bytes for report in done),
        written=written,
        seconds=seconds,
    )
