"""Checkpoints of a work directory, through orbax. The only module that knows orbax's interface."""

import json
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from imagen_jax.config import build, differences, to_dict
from imagen_jax.data.files import write_text
from imagen_jax.errors import UserError
from imagen_jax.sampling.model_folder import read_json
from imagen_jax.training.config import RESUMABLE, TrainConfig
from imagen_jax.training.state import TrainState


class Checkpoints:
    """Saves in the background and restores the newest complete checkpoint, onto any mesh.

    Beside the state a checkpoint holds the position in the data (one count of examples) and the resolved
    config. A save that was cut off leaves a folder that is no checkpoint and is cleared at the next start.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int | None = None):
        """Opens WORKDIR/checkpoints; `keep` newest are kept, None keeps all."""
        self.folder = epath.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, *, examples: int, config: TrainConfig) -> None:
        """Starts saving; returns once the arrays are copied. `examples` is the global count consumed."""
        if step in self._manager.all_steps():
            return
        run = {"examples": examples, "config": to_dict(config)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._manager.save(step, args=args)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
        """The state, onto the shardings of `abstract`, and the count of examples consumed."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return TrainState(*restored.state), restored.run["examples"]

    def wait(self) -> None:
        """Blocks until saves under way are complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saves under way and frees the manager's threads."""
        self._manager.close()


def write_config(workdir: epath.Path, config: TrainConfig) -> None:
    """Writes the resolved config as WORKDIR/config.json, by renaming a complete file, unless it is there."""
    workdir.mkdir(parents=True, exist_ok=True)
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


def check_same_config(workdir: epath.Path, config: TrainConfig) -> None:
    """Refuses to go on with a run of another config.

    Raises:
      UserError: naming the first field that differs, among those that a resumed run must keep, or that is
        unknown.
    """
    # Through the dataclass: fields that are newer than the run have their defaults, which is how it ran.
    before = build(TrainConfig, read_config(workdir), f"{workdir}/config.json")
    lines = differences(to_dict(before), to_dict(config))
    changed = [line for line in lines if not line.startswith(RESUMABLE)]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"--workdir {workdir} holds a run of another config: {changed[0]}{more}; "
            "take another --workdir or the old config"
        )
