"""Every field of every JSON file that is read, spoilt by kind: one line that names the file or the field."""

import dataclasses
import json

import pytest

from tests.hostile.conftest import stop
from tests.hostile.mutations import HUGE, JSON_KINDS, mutated_json

# Where these may be read and used, or be refused: a text, or a field that has a default.
EITHER = ("missing", "NUL", "outside path", "negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A JSON file and the command that reads it."""

    command: tuple[str, ...]
    unread: tuple[str, ...] = ()  # fields that nobody looks at
    optional: tuple[str, ...] = ()  # fields for which null means the default
    any_number: tuple[str, ...] = ()  # fields that have no bounds
    large: tuple[str, ...] = ()  # fields that may be 10⁹, and no more
    also: tuple[str, ...] = ()  # what messages may name instead of the file or the field
    may_change: tuple[str, ...] = ()  # what the command may write first
    stop: str | None = None  # where its work begins, if earlier than that of the command with good files
    limit: int = 100  # fields looked at


SAMPLE = ("sample", "a red circle", "--model=model", "--out=out")
TRAIN = ("train", "--config=config.py", "--config.data.path=records", "--workdir=out")
JOINED = (*TRAIN, "--config.data.embeddings=embeddings")
IMPORT = ("import", "deepfloyd", "--stage1=pipeline", "--out=out")
UNREAD_INFO = ("description", "version", "fileFormat", "filepathTemplate", "numBytes")
# How long to train and how often to do what: 10⁹ is the most.
LOOP_NUMBERS = ("steps", "max_skipped", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best")
LOOP_NUMBERS += ("sample_every", "eval_every", "eval_batches", "seed")
T5 = {
    "unread": (
        *("architectures", "0", "dropout_rate", "is_encoder_decoder", "pad_token_id", "eos_token_id"),
    ),
    "any_number": ("relative_attention_max_distance",),
    "optional": ("feed_forward_proj",),
    "also": ("text_encoder",),
}
FILES = {
    "model/model_index.json": File(command=SAMPLE, also=("model: text encoder",)),
    "model/base8/config.json": File(
        command=SAMPLE,
        optional=(
            "low_resolution",
            "crop",
            "grid",
            "max_scale",
            "log_snr_min",
            "log_snr_max",
            "oscillate_after",
            "embedding_width",
        ),
    ),
    "model/text_encoder/config.json": File(command=SAMPLE, **T5),
    "model/text_encoder/tokenizer_config.json": File(
        command=SAMPLE, unread=("pad_token",), optional=("unk_token",), also=("text_encoder",)
    ),
    "model/text_encoder/tokenizer.json": File(
        command=SAMPLE,
        unread=("version", "truncation", "padding"),
        any_number=("id",),
        also=("text_encoder",),
        limit=12,
    ),
    "records/dataset_info.json": File(
        command=TRAIN, unread=UNREAD_INFO, also=("no split", "records holds only 7")
    ),
    "records/metadata.json": File(command=TRAIN, optional=("block_size", "identity")),
    "embeddings/dataset_info.json": File(command=JOINED, unread=UNREAD_INFO, also=("no split",), limit=3),
    "run/config.json": File(
        command=("export", "--from=run", "--out=out"),
        optional=("embedding_width",),
        large=LOOP_NUMBERS,
        also=("config.", "not a complete record folder"),
        stop="imagen_jax.training.export._averaged",
    ),
    "run/init_from.json": File(
        command=("train", "--config=config.py", "--workdir=run"),
        unread=("weights", "changed"),
        may_change=("run/lock",),
    ),
    "pipeline/unet/config.json": File(
        command=IMPORT,
        optional=("mid_block_only_cross_attention", "encoder_hid_dim_type"),
        also=("--stage1 pipeline", "config.json is of another network"),
    ),
    "pipeline/scheduler/scheduler_config.json": File(
        command=IMPORT, unread=("_class_name",), also=("--stage1 pipeline",)
    ),
    "pipeline/text_encoder/config.json": File(command=IMPORT, **T5),
}


@pytest.mark.parametrize("kind", JSON_KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_spoilt_field(name, kind, place, run, monkeypatch):
    file, path, faults = FILES[name], place / name, []
    if file.stop is not None:
        monkeypatch.setattr(file.stop, stop)
    content = json.loads(path.read_text())
    harmless = {
        "null": (*file.unread, *file.optional),
        "huge": (*file.unread, *file.any_number),
        "not finite": file.unread,
    }.get(kind, file.unread)
    for what, text in mutated_json(content, kind, limit=file.limit):
        path.unlink()
        path.write_text(text)
        outcome = run(*file.command)
        field = what.partition(" = ")[0].rpartition(".")[2]
        large = field in file.large and what.endswith(f" = {HUGE}")
        if outcome.reached and (kind in EITHER or field in harmless or large):
            continue
        if fault := outcome.fault(name, field, *file.also, may_change=file.may_change):
            faults.append(f"{what}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} of {name}", *faults])
