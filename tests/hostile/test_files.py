"""Every file that is read, damaged by kind: one line that names it, and nothing is written."""

from pathlib import Path

import pytest

from tests.hostile.mutations import FILE_KINDS

SAMPLE = ("sample", "a red circle", "--model=model", "--out=out")
TRAIN = ("train", "--config=config.py", "--config.data.path=records", "--workdir=out")
TAR_KINDS = {"missing", "a pipe", "a device"}
RESUME = ("train", "--config=config.py", "--workdir=run")
EXPORT = ("export", "--from=run", "--out=out")
IMPORT = ("import", "deepfloyd", "--stage1=pipeline", "--out=out")
ENCODER = ("--text_encoder=encoder", "--out=out")
TEXT_KINDS = ("missing", "not UTF-8", "a pipe", "a device", "a folder", "a link to itself")
# File → the command that reads it, what the message names beside the file, and kinds that do no harm.
FILES = {
    "model/model_index.json": (SAMPLE, ("--model model",), ()),
    "model/base8/config.json": (SAMPLE, (), ()),
    "model/base8/model.safetensors": (SAMPLE, (), ()),
    "model/text_encoder/config.json": (SAMPLE, ("text_encoder",), ()),
    "model/text_encoder/model.safetensors": (SAMPLE, ("text_encoder",), ()),
    "model/text_encoder/tokenizer.json": (SAMPLE, ("text_encoder",), ()),
    "model/text_encoder/tokenizer_config.json": (SAMPLE, ("text_encoder",), ()),
    "records/dataset_info.json": (TRAIN, (), ()),
    "records/metadata.json": (TRAIN, (), ()),
    "embeddings/keys-train.npy": ((*TRAIN, "--config.data.embeddings=embeddings"), (), ()),
    "config.py": (TRAIN, (), ()),
    "run/config.json": (EXPORT, ("--from run", "run is not a work directory"), ()),
    "run/init_from.json": (RESUME, (), ("missing",)),
    "pipeline/unet/config.json": (IMPORT, ("--stage1 pipeline",), ()),
    "pipeline/unet/diffusion_pytorch_model.safetensors": (IMPORT, ("pipeline/unet",), ()),
    "pipeline/scheduler/scheduler_config.json": (IMPORT, ("--stage1 pipeline",), ("missing",)),
    "pipeline/text_encoder/config.json": (IMPORT, ("pipeline",), ()),
    "pipeline/text_encoder/model.safetensors": (IMPORT, ("pipeline",), ()),
    "prompts.txt": (
        (*SAMPLE[:1], *SAMPLE[2:], "--prompts_file=prompts.txt"),
        ("--prompts_file", "give a prompt"),
        # Lines of text, if odd ones.
        ("truncated", "deep JSON", "deep objects", "a list", "a number", "an empty object", "zeros")
        + ("a number of 5000 digits", "a Git LFS pointer"),
    ),
    "like.png": (("sample", "--like=like.png", "--out=out"), ("--like",), ()),
    "pictures/captions.jsonl": (
        ("precompute", "--source=folder:pictures", *ENCODER),
        ("--source",),
        # Its lines are skipped, one by one, and counted.
        tuple(set(FILE_KINDS) - {"a pipe", "a device", "a link to itself"}),
    ),
    "tars/0.tar": (
        ("precompute", "--source=webdataset:tars/*.tar", *ENCODER),
        ("--source",),
        tuple(set(FILE_KINDS) - TAR_KINDS),  # counted and listed as one that does not open
    ),
    "rows/0.parquet": (
        ("precompute", "--source=parquet:rows", *ENCODER),
        ("--source",),
        (),
    ),
    "encoder/config.json": (("precompute", "--source=folder:pictures", *ENCODER), ("encoder",), ()),
    "encoder/tokenizer.json": (("precompute", "--source=folder:pictures", *ENCODER), ("encoder",), ()),
    "encoder/model.safetensors": (("precompute", "--source=folder:pictures", *ENCODER), ("encoder",), ()),
}


@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.kill)])
def test_a_damaged_checkpoint(most, place, run):
    """So many files of each of its folders, or all."""
    folder, faults = place / "run" / "checkpoints" / "2", []
    parts = sorted(path for path in folder.rglob("*") if path.is_dir())
    paths = [
        path for part in (folder, *parts) for path in sorted(filter(Path.is_file, part.iterdir()))[:most]
    ]
    names = [str(path.relative_to(place.root)) for path in paths]
    kinds = ("missing", "truncated", "not UTF-8", "a list", "a pipe")
    for number, name in enumerate(names):
        # One kind a file, in turn: restoring takes a second.
        kind = kinds[number % len(kinds)]
        FILE_KINDS[kind](place / name)
        outcome = run(*EXPORT)
        place.restore(name)
        # Some say only when the checkpoint was made.
        if not outcome.reached and (fault := outcome.fault("run")):
            faults.append(f"{name} {kind}: {fault}")
    assert names and not faults, "\n".join([f"{len(faults)} of {len(names)}", *faults])


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(name, place, run):
    command, also, harmless = FILES[name]
    faults = []
    for kind, damage in FILE_KINDS.items():
        place.restore(name)
        damage(place / name)
        outcome = run(*command)
        if outcome.reached and kind in harmless:
            continue
        if fault := outcome.fault(name, *also, may_change=("run/lock",)):
            faults.append(f"{kind}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} of {name}", *faults])
