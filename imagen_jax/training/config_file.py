"""The config of a work directory, config.json: what the run was started with, in full."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from imagen_jax.config import build, differences, to_dict
from imagen_jax.errors import UserError
from imagen_jax.files import make_folder, read_json, write_text
from imagen_jax.training.config import RENAMEABLE, RESUMABLE, TrainConfig


def write_config(workdir: epath.Path, config: TrainConfig) -> None:
    """Writes the resolved config as WORKDIR/config.json, by renaming a complete file, unless it is there."""
    make_folder(workdir)
    path, text = workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n"
    if path.exists() and path.read_text() == text:
        return
    write_text(path, text)


def read_config(workdir: epath.PathLike) -> Mapping[str, Any]:
    """The resolved config of a work directory.

    Raises:
      UserError: if there is none or it is no JSON.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a work directory of a training run: it has no config.json")
    return read_json(path)


def check_same_config(workdir: epath.Path, config: TrainConfig, *, same_encoder: bool = False) -> None:
    """Refuses to go on with a run of another config.

    Args:
      workdir: of the run.
      config: to go on with.
      same_encoder: whether the text encoder is known to be the same one, so that it may be found elsewhere.

    Raises:
      UserError: naming the first field that differs, among those that a resumed run must keep, or that is
        unknown.
    """
    # Through the dataclass: fields that are newer than the run have their defaults, which is how it ran.
    before = build(TrainConfig, read_config(workdir), f"{workdir}/config.json")
    lines = differences(to_dict(before), to_dict(config))
    changed = [line for line in lines if not line.startswith(RESUMABLE)]
    if same_encoder:
        changed = [line for line in changed if not line.startswith(RENAMEABLE) or line.endswith("→ None")]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"--workdir {workdir} holds a run of another config: {changed[0]}{more}; "
            "take another --workdir or the old config"
        )
