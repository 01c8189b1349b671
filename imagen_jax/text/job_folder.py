"""The folder of an embedding job, as several processes see it: claiming it and finishing it.

Nothing here waits for another process. What every process writes is written under a name of its own and
renamed, with the same bytes, so that any of them may be killed or come twice.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagen_jax.data import records
from imagen_jax.data.encoder_identity import EncoderIdentity, check_same_encoder
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.files import json_field, json_object, read_bytes, read_json
from imagen_jax.lock import remove_unheld
from imagen_jax.text.shards import ShardReport, read_key_hashes, report_files


def _read_job(out: epath.Path) -> dict[str, Any]:
    """The content of job.json.

    Raises:
      UserError: it is missing or not such a file.
    """
    path = out / "job.json"
    try:
        job = read_json(path)
        for split, values in json_field(job, "splits", dict, str(path)).items():
            json_object(values, f"{path}: split {split!r}")
    except UserError as error:
        raise UserError(f"{path}: not a job description ({error}); use another --out") from error
    job.setdefault("embeddings_only", False)
    return job


def check_job(out: epath.Path, split: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """The splits of the job that is there, if it is the same; arguments as of `claim_folder`.

    Raises:
      UserError: it is a different one; names the first flag that differs.
    """
    there = _read_job(out)
    splits = there.pop("splits")
    old = {**there, **splits.get(split, job["split"])}
    shared = {key: value for key, value in job.items() if key != "split"}
    for key, value in {**shared, **job["split"]}.items():
        if old.get(key) != value:
            what = f"--{key} was {old.get(key)!r}, now {value!r}"
            if key == "fingerprint":
                what = f"the files of --source {job['split']['source']!r} have changed"
            raise UserError(f"--out: {out} holds a different job: {what}; use another --out")
    return splits


def encoder_name(out: epath.Path) -> str | None:
    """Under which name the text encoder of the complete shards was given; None where there are none.

    Raises:
      UserError: job.json is missing or not such a file.
    """
    return _read_job(out).get("text_encoder") if report_files(out) else None


def encoder_identities(out: epath.Path) -> list[EncoderIdentity | None]:
    """Of the text encoder of each split's first complete shard; None where it is not known."""
    first: dict[str, epath.Path] = {}
    for file in report_files(out):
        first.setdefault(file.name.partition(".tfrecord-")[0], file)
    return [_identity(file) for file in first.values()]


def _identity(file: epath.Path) -> EncoderIdentity | None:
    try:
        return ShardReport.read(file).identity
    except (ValueError, TypeError):
        return None


def claim_folder(out: epath.Path, split: str, job: Mapping[str, Any]) -> None:
    """Writes job.json, or checks that the one that is there says the same.

    Until a first shard is complete nothing is lost by another configuration, and it may replace the old
    one. Of two different jobs that start at the same moment at most one goes on: this one looks for shards
    after it has written job.json, and the other looks at job.json after each shard (`still_ours`).

    Args:
      out: the record folder.
      split: name of the split to be written.
      job: what decides about the bytes; under "split" what concerns this split alone.

    Raises:
      UserError: the folder belongs to a different job; names the first flag that differs.
    """
    path = out / "job.json"
    splits: dict[str, Any] = {}
    if report_files(out):
        splits = check_job(out, split, job)
    elif (out / "dataset_info.json").exists():
        raise UserError(f"--out: {out} holds a data set of another origin; use another --out")
    splits[split] = job["split"]
    content = {**{key: value for key, value in job.items() if key != "split"}, "splits": splits}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if not path.exists() or read_bytes(path) != text.encode("utf-8"):
        records.write_shared_json(path, content)
        if report_files(out):
            check_job(out, split, job)


def still_ours(out: epath.Path, split: str, job: Mapping[str, Any]) -> None:
    """Checks that no other job has taken the folder since `claim_folder`.

    Raises:
      UserError: one has; names the first flag that differs.
    """
    if split not in check_job(out, split, job):
        raise UserError(f"--out: {out} was taken by another job in the meantime; use another --out")


def lock_name(split: str, process: str) -> str:
    """The file in a job's folder that a process holds while it writes shards of a split."""
    return f"job/{split}.{process}.lock"


def write_skipped(out: epath.Path) -> None:
    """Collects what the shards of all splits skipped into `skipped.jsonl`, in order."""
    reports = [(file, read_json(file)) for file in report_files(out)]
    skipped = [item for file, report in reports for item in json_field(report, "skipped", list, str(file))]
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in skipped)
    records.write_shared(out / "skipped.jsonl", lambda: [text.encode("utf-8")])


def write_key_index(
    out: epath.Path, split: str, shards: Sequence[str], reports: Sequence[ShardReport]
) -> None:
    """Writes the index by which the embeddings of a split are found.

    Raises:
      UserError: two records have the same key.
    """
    records.write_key_index(out, split, read_key_hashes(out, shards))
    ends = np.cumsum([report.records for report in reports])
    for numbers in records.KeyIndex(out, split).shared_hashes():
        # Different keys may share a hash: with 10^8 records it happens once in thousands of folders.
        seen: dict[str, str] = {}
        for number in numbers:
            shard = int(np.searchsorted(ends, number, side="right"))
            position = int(number - (ends[shard] - reports[shard].records))
            data = TFRecordReader(out / shards[shard])[position]
            key = records.parse(data, reports[shard].width, shards[shard], images=False).key
            if key in seen:
                raise UserError(
                    f"--source: the key {key!r} occurs twice (in {seen[key]} and in {shards[shard]}); "
                    "embeddings are joined by key, so that each must be unique"
                )
            seen[key] = shards[shard]


def write_info(info: records.FolderInfo) -> None:
    """Writes the metadata of new splits and of those that were complete before.

    Args:
      info: of the folder, with the new splits only.

    Raises:
      UserError: the splits that were there are of another text encoder.
    """
    splits: dict[str, records.SplitInfo] = {}
    sources: dict[str, str] = {}
    identity = info.encoder.identity
    if (info.path / "dataset_info.json").exists():
        before = records.read_folder_info(info.path)
        splits.update(before.splits)
        sources.update(before.encoder.source)
        there = set(before.splits) - set(info.splits)
        if there:
            check_same_encoder(
                before.encoder.identity,
                identity,
                f"--text_encoder: {info.encoder.text_encoder!r} is not the encoder that split {min(there)!r} in "
                f"{info.path} was made with",
                "; use another --out",
            )
            identity = identity or before.encoder.identity
    encoder = dataclasses.replace(info.encoder, source={**sources, **info.encoder.source}, identity=identity)
    records.write_folder_info(dataclasses.replace(info, splits={**splits, **info.splits}, encoder=encoder))


def remove_leftovers(out: epath.Path, split: str) -> None:
    """Removes the temporary files that killed processes have left, once the shards of a split are complete.

    Shards of other splits may be being written; theirs stay. A process that is writing the same metadata at
    this moment does so once more (`write_shared`).
    """
    for file in out.glob(lock_name(split, "*")):
        remove_unheld(file)
    for folder in (out, out / "job"):
        for file in folder.glob("incomplete.*"):
            if ".tfrecord-" not in file.name or f"-{split}.tfrecord-" in file.name:
                file.unlink(missing_ok=True)
