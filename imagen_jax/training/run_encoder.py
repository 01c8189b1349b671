"""The text encoder of a run: that of its records, or the one beside it, and no other when it goes on.

The checkpoints carry its identity; WORKDIR/text_encoder.json repeats it from the first step on, for the start of a
run and for tools that do not read checkpoints.
"""

import json

import jax
from etils import epath

from imagen_jax.data.encoder_identity import (
    EncoderIdentity,
    check_same_encoder,
    identity_from_json,
    identity_to_json,
    warn_unknown_encoder,
)
from imagen_jax.data.records import read_folder_info
from imagen_jax.files import exists, read_json, seen_from, write_text
from imagen_jax.training.config import DataConfig
from imagen_jax.training.online import OnlineText

FILE = "text_encoder.json"


def data_encoder(data: DataConfig, online: OnlineText | None) -> EncoderIdentity | None:
    """What makes the text of a run: the encoder beside it, or the one that made its records; None: not known.

    Raises:
      UserError: not a complete record folder.
    """
    if online is not None:
        return online.identity
    identity = read_folder_info(data.embeddings or data.path).encoder.identity
    if identity is None and jax.process_index() == 0:
        warn_unknown_encoder(f"the records in {data.embeddings or data.path} do")
    return identity


def records_encoder(records: str) -> str:
    """Folder or hub id of the text encoder that made a folder of records.

    Raises:
      UserError: not a complete record folder.
    """
    info = read_folder_info(records).encoder
    seen = epath.Path(seen_from(records, info.encoder_path))
    return str(seen) if info.encoder_path and seen.is_dir() else info.text_encoder


def recorded_encoder(workdir: epath.Path) -> EncoderIdentity | None:
    """The encoder that a work directory names; None: it names none.

    Raises:
      UserError: WORKDIR/text_encoder.json is something else.
    """
    path = workdir / FILE
    return identity_from_json(read_json(path), str(path)) if exists(path) else None


def write_encoder(workdir: epath.Path, encoder: EncoderIdentity | None) -> None:
    """Writes WORKDIR/text_encoder.json unless it is there or nothing is known."""
    if encoder is not None and not exists(workdir / FILE):
        write_text(workdir / FILE, json.dumps(identity_to_json(encoder), indent=2) + "\n")


def check_encoder(
    workdir: epath.Path, data: DataConfig, run: EncoderIdentity | None, encoder: EncoderIdentity | None
) -> None:
    """Refuses to go on with the text of another encoder.

    Args:
      workdir: of the run.
      data: where its text comes from.
      run: the encoder of the run so far; None: not known.
      encoder: `data_encoder`.

    Raises:
      UserError: they are known and differ.
    """
    what = f"the records in {data.embeddings or data.path} are"
    if data.text_encoder is not None:
        what = f"--config.data.text_encoder={data.text_encoder} is"
    check_same_encoder(
        run,
        encoder,
        f"--workdir {workdir}: {what} of another text encoder than the run's",
        "; go on with that of the run, or take another --workdir",
    )


def resumed_encoder(
    workdir: epath.Path, data: DataConfig, run: EncoderIdentity | None, encoder: EncoderIdentity | None
) -> EncoderIdentity | None:
    """The encoder that the next checkpoints carry; arguments as of `check_encoder`, `run` from the checkpoint.

    Raises:
      UserError: as `check_encoder`.
    """
    check_encoder(workdir, data, run, encoder)
    if run is None and encoder is not None and jax.process_index() == 0:
        warn_unknown_encoder(f"the checkpoints in {workdir} do")
    return run or encoder
