"""Checkpoints of a work directory, through orbax. The only module that knows orbax's interface.

A checkpoint knows its own content. Beside the arrays it holds a checksum of each, summed up where the array lay before
it was copied and compared with what was restored: whatever becomes of the bytes between the two is noticed. What it
holds as JSON carries a checksum of its own.
"""

import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from imagen_jax.config import to_dict
from imagen_jax.data.encoder_identity import EncoderIdentity, identity_from_json, identity_to_json
from imagen_jax.errors import UserError
from imagen_jax.files import (
    check_regular,
    cloud_fault,
    files_below,
    is_cloud,
    json_field,
    make_folder,
    move_folder,
    read_json,
)
from imagen_jax.parallel.processes import gather, on_first
from imagen_jax.training.checksums import add_checksums, begin_checksums, json_checksum
from imagen_jax.training.config import Best, TrainConfig
from imagen_jax.training.keep import Keep, damaged_metrics, score
from imagen_jax.training.state import TrainState, from_stored_form, stored_form

# What storage answers when it is not the checkpoint that is at fault.
_NOT_DAMAGE = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)


class _NoEchoes(logging.Filter):
    """Drops what is of no use to users: how a folder is read, and failures, which are raised as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        from_orbax, said = "orbax" in record.pathname, record.getMessage()
        needless = ("read only", "read_only", "size logging")
        if from_orbax and (record.exc_info is not None or any(part in said for part in needless)):
            return False
        return "exception was never retrieved" not in said


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_NoEchoes())


class _ChecksumHandler(ocp.AsyncCheckpointHandler):
    """Writes checksums in the background, as orbax writes the arrays: those of each process in a file of its own."""

    async def async_save(self, directory: epath.Path, args: "_ChecksumSave") -> list[ocp.future.Future]:
        async def write() -> None:
            text = json.dumps(args.finish())
            (directory / f"process_{jax.process_index()}.json").write_text(text)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="checksums")]

    def save(self, directory: epath.Path, args: "_ChecksumSave") -> None:
        raise NotImplementedError

    def restore(self, directory: epath.Path, args: Any = None) -> dict[str, int]:
        parts = [(path, read_json(path)) for path in directory.glob("process_*.json")]
        return add_checksums(
            {name: json_field(part, name, int, str(path)) for name in part} for path, part in parts
        )


@ocp.args.register_with_handler(_ChecksumHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ChecksumSave(ocp.args.CheckpointArgs):
    finish: Callable[[], dict[str, int]]  # as `begin_checksums` gives it


class _Content(NamedTuple):
    """What is in a checkpoint."""

    state: TrainState  # in its stored form
    run: dict[str, Any]
    checksums: dict[str, int] | None  # by an array's path; None: it was made by a version that wrote none


class Checkpoints:
    """Saves in the background and restores the newest checkpoint that is intact, onto any mesh.

    All processes of a job write and read their own parts, in a folder that all of them see. Beside the state a
    checkpoint holds the position in the data (one count of examples) and the resolved config. A save that was cut
    off leaves a folder that is no checkpoint and is cleared at the next start.

    Raises:
      UserError: the folder cannot be written.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: Keep | None = None):
        """Opens WORKDIR/checkpoints; without `keep` for reading only, also while a run writes there."""
        workdir = epath.Path(workdir)
        # An absolute path is what orbax takes; of a cloud path `resolve` would make a local one.
        self.folder = (workdir if is_cloud(workdir) else workdir.resolve()) / "checkpoints"
        if os.fspath(self.folder).startswith("s3://"):
            # Only here: it names orbax's insides, which checkpoints elsewhere must not depend on.
            from imagen_jax.training.orbax_s3 import teach_orbax_s3

            teach_orbax_s3()
        self._keep, self._failed = keep or Keep(), False
        self._echoes = contextlib.ExitStack()
        if keep is None:
            best = None if damaged_metrics(self.folder) else score
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, best_fn=best)
        else:
            on_first(self._check_writable)
            on_first(self._drop_damaged_metrics)
            options = keep.options()
            self._echoes.enter_context(_no_late_answers())
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
                "checksums": _ChecksumHandler(),
            },
        )

    def _check_writable(self) -> None:
        """A read-only folder is refused before hours of training, not after."""
        probe = self.folder / "incomplete.probe"
        try:
            make_folder(self.folder)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{self.folder}: {error.strerror or error}; checkpoints must be written there"
            ) from error

    def _drop_damaged_metrics(self) -> None:
        """The manager reads the metrics of all checkpoints at once, and fails at one that it cannot read."""
        for path in damaged_metrics(self.folder):
            path.rename(path.parent / "damaged")
            print(
                f"{path} is damaged; the checkpoint is not among the best any more",
                file=sys.stderr,
                flush=True,
            )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the best metric; None: no checkpoint has one, or one of them is damaged."""
        return None if damaged_metrics(self.folder) else self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        examples: int,
        config: TrainConfig,
        metric: float | None = None,
        encoder: EncoderIdentity | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied.

        Args:
          step: optimizer steps done.
          state: what to save.
          examples: global count of examples consumed.
          config: the run.
          metric: by which the best are kept; None: this one is not among them.
          encoder: the text encoder of the run; None: not known.

        Raises:
          UserError: this save or the one before failed; says which checkpoint is intact.
        """
        if step in self._manager.all_steps():
            return
        stored = stored_form(state)
        run = {
            "examples": examples,
            "config": to_dict(config),
            "text_encoder": identity_to_json(encoder),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(stored),
            run=ocp.args.JsonSave({**run, "crc32c": json_checksum(run)}),
            checksums=_ChecksumSave(begin_checksums(stored)),
        )
        metrics = None
        if metric is not None and self._keep.best:
            metrics = {"value": metric, "score": metric if self._keep.best_is is Best.HIGHEST else -metric}
            metrics["crc32c"] = json_checksum(metrics)
        with self._failing():
            self._manager.save(step, args=args, metrics=metrics)

    def encoder(self, step: int) -> EncoderIdentity | None:
        """The text encoder of the run; None: not known.

        Raises:
          UserError: the checkpoint is damaged.
        """
        try:
            run, _ = self._read_run(step)
        except ValueError as error:
            raise UserError(f"{self.folder / str(step)} is damaged ({_fault(error)})") from error
        return identity_from_json(run.get("text_encoder"), f"{self.folder / str(step) / 'run'}: text_encoder")

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
        """The state, onto the shardings of `abstract`, and the count of examples consumed.

        Raises:
          UserError: the checkpoint is damaged.
        """
        try:
            with _quiet():
                content = self._read(step, abstract)
            fault = self._compare(step, content)
        except Exception as error:
            if _refused(error):
                raise
            fault = _fault(error)
        if fault:
            raise UserError(
                f"{self.folder / str(step)} is damaged ({fault}); imagen-jax train sets it aside and goes on from "
                "the checkpoint before"
            )
        return from_stored_form(content.state, abstract), content.run["examples"]

    def _read(self, step: int, abstract: TrainState) -> _Content:
        """Reads a checkpoint; its arrays are still to be compared with their checksums."""
        # Not through the manager: there a process that fails leaves the others waiting at a barrier.
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        run, checksums = self._read_run(step)
        handler, stored = ocp.StandardCheckpointHandler(multiprocessing_options=alone), stored_form(abstract)
        restored = handler.restore(self.folder / str(step) / "state", args=ocp.args.StandardRestore(stored))
        return _Content(TrainState(*restored), run, checksums)

    def _read_run(self, step: int) -> tuple[dict[str, Any], dict[str, int] | None]:
        """What is said of the run, and the arrays' checksums; ValueError: it is not as it was saved."""
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        folder, checksums = self.folder / str(step), None
        if not is_cloud(folder):
            for file in files_below(folder):
                check_regular(file)  # orbax would wait for ever
        run = dict(ocp.JsonCheckpointHandler(multiprocessing_options=alone).restore(folder / "run"))
        if (folder / "checksums").exists() or "crc32c" in run:
            checksums = _ChecksumHandler().restore(folder / "checksums")
            if run.pop("crc32c", None) != json_checksum(run):
                raise ValueError(f"{folder / 'run'} is not as saved")
        return run, checksums

    def _compare(self, step: int, content: _Content) -> str:
        """Compares arrays with their checksums; what is wrong, or nothing. All processes have to call it."""
        saved = content.checksums
        if saved is None:
            if jax.process_index() == 0:
                print(
                    f"{self.folder / str(step)} is of a version that wrote no checksums: whether its content has "
                    "changed cannot be seen",
                    file=sys.stderr,
                    flush=True,
                )
            return ""
        here = add_checksums(map(json.loads, gather(json.dumps(begin_checksums(content.state)()))))
        wrong = [name for name in here | saved if here.get(name) != saved.get(name)]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"state{wrong[0]}{more} not as saved" if wrong else ""

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, int, int] | None:
        """State, count of examples and step of the newest checkpoint that is intact, or None without any.

        One that is damaged is moved to WORKDIR/damaged_checkpoints, and a line says so. All processes take the
        same one.

        Raises:
          UserError: there are checkpoints and none is intact, or the storage refuses.
        """
        steps = on_first(lambda: sorted(self._manager.all_steps(), reverse=True))
        for step in steps:
            found, fault = None, ""
            with _quiet():
                try:
                    found = self._read(step, abstract)
                except Exception as error:
                    if _refused(error):
                        raise
                    fault = _fault(error)
            faults = [said for said in gather(fault) if said]
            if found is not None and not faults:
                # Only now: all processes have their parts.
                faults = [said for said in gather(self._compare(step, found)) if said]
                if not faults:
                    return from_stored_form(found.state, abstract), found.run["examples"], step
            place = self.folder.parent / "damaged_checkpoints" / str(step)
            on_first(lambda step=step, place=place: self._set_aside(step, place))  # type: ignore[misc]
            if jax.process_index() == 0:
                print(
                    f"{self.folder / str(step)} is damaged ({faults[0]}); moved to {place}, going on from the "
                    "checkpoint before",
                    file=sys.stderr,
                    flush=True,
                )
            self._manager.reload()
        if steps:
            raise UserError(
                f"{self.folder}: none of the {len(steps)} checkpoints can be restored; they are in "
                f"{self.folder.parent / 'damaged_checkpoints'}; start in another --workdir"
            )
        return None

    def _set_aside(self, step: int, place: epath.Path) -> None:
        make_folder(place.parent)
        if place.exists():
            place.rmtree()
        move_folder(self.folder / str(step), place)

    def check(self) -> None:
        """Raises what a save in the background has run into.

        Raises:
          UserError: it failed; says which checkpoint is intact.
        """
        with self._failing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until saves under way are complete.

        Raises:
          UserError: one of them failed; says which checkpoint is intact.
        """
        with self._failing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turns the failure of a save into one line; that of another process or of a device goes on as it is."""
        try:
            yield
        except Exception as error:
            self._failed = True
            if isinstance(_root(error), jax.errors.JaxRuntimeError):
                raise
            # In an object store the folder of a checkpoint has its name before it is complete.
            intact = self._manager.all_steps(read=True)
            newest = f"the newest complete one is from step {max(intact)}" if intact else "there is none yet"
            raise UserError(
                f"{self.folder}: a checkpoint could not be saved ({_fault(error)}); {newest}; put it right and "
                "run the same command again"
            ) from error

    def close(self) -> None:
        """Finishes saves under way and frees the manager's threads."""
        with self._echoes:
            if not self._failed:  # else it would raise the same again
                self._manager.close()


def _root(error: BaseException) -> BaseException:
    """What is at the bottom of a failure."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _refused(error: BaseException) -> bool:
    """Whether it is not the checkpoint that is at fault, but the storage, the memory or what was asked for."""
    storage = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    storage = storage or cloud_fault(_root(error)) is not None
    return storage or isinstance(error, MemoryError) or _fault(error).startswith(_NOT_DAMAGE)


def _fault(error: BaseException) -> str:
    """The reason at the bottom of a failure, in a line of bearable length."""
    error = _root(error)
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    return text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"


@contextlib.contextmanager
def _no_late_answers() -> Iterator[None]:
    """Keeps off the terminal what tensorstore prints when it answers a save that has failed already."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what reading a damaged checkpoint prints from its background tasks off the terminal."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
            gc.collect()  # tasks that failed report when they are collected
    finally:
        sys.unraisablehook = hook
