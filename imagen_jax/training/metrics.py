"""Metrics as JSON lines, TensorBoard events and, if asked for, in Weights & Biases."""

import contextlib
import dataclasses
import io
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory
from tqdm import tqdm

from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, is_cloud, json_field, json_object, parse_json, read_bytes, write_text
from imagen_jax.training.clock import StepClock, memory_in_use


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """What is known of a step's arithmetic, to say how well the devices are used."""

    flops: float  # floating-point operations of the model for one example, forward and backward
    peak_flops: float  # a second, of one device at the precision of the computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbRun:
    """Where in Weights & Biases a run is logged."""

    project: str
    config: Mapping[str, Any]  # shown beside the run


class _Lines:
    """A text file that grows by lines."""

    def __init__(self, path: epath.Path):
        self._path = path
        # An object store takes whole files only: there the lines before are kept, and written again with the next.
        self._before: str | None = None
        if is_cloud(path):
            self._before = path.read_text() if path.exists() else ""

    def append(self, line: str) -> None:
        if self._before is None:
            with self._path.open("a") as file:
                file.write(line + "\n")
            return
        self._before += line + "\n"
        write_text(self._path, self._before)


class _CloudEvents:
    """A file of TensorBoard events in an object store: what there is is written anew at each flush."""

    def __init__(self, path: str):
        self._path, self._events = path, io.BytesIO()

    def write(self, data: bytes) -> None:
        self._events.write(data)

    def flush(self) -> None:
        # In a thread of tensorboardX's, which an error would end; the next flush tries again.
        with contextlib.suppress(UserError), AtomicFile(self._path) as file:
            file.write(self._events.getvalue())

    def close(self) -> None:
        self.flush()


class _CloudEventFiles:
    """Opens `_CloudEvents` for tensorboardX, whose own writers need other packages and sign-ins than ours."""

    def open(self, path: str) -> _CloudEvents:
        return _CloudEvents(path)

    def directory_check(self, path: str) -> None:
        """There are no folders to be made."""


for _scheme in ("gs", "s3"):
    register_writer_factory(_scheme, _CloudEventFiles())


def trim_lines(path: epath.Path, last_step: int) -> None:
    """Drops the lines of a metrics file that come after `last_step`, and a line cut off by a crash.

    A resumed run logs those steps again, so that the file keeps one line a step.
    """
    if not path.exists():
        return
    kept = []
    for line in read_bytes(path).split(b"\n"):
        try:
            step = json_field(json_object(parse_json(line, "a line"), "a line"), "step", int, "a line")
        except UserError:
            continue
        if step <= last_step:
            kept.append(line.decode("utf-8") + "\n")
    write_text(path, "".join(kept))


def open_wandb(workdir: epath.Path, run: WandbRun) -> Any:
    """Opens the run of a work directory in Weights & Biases; a resumed run goes on there.

    Its id is written to WORKDIR/wandb_id.txt. WANDB_MODE=offline keeps all in WORKDIR/wandb, or in ./wandb if the
    work directory is in an object store.

    Raises:
      UserError: the package is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package wandb: pip install 'imagen_jax[wandb]'") from error
    path = workdir / "wandb_id.txt"
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    opened = wandb.init(
        project=run.project,
        name=workdir.name,
        id=path.read_text().strip(),
        resume="allow",
        dir=None if is_cloud(workdir) else str(workdir),
        config=dict(run.config),
    )
    # Its own step never goes back, that of a resumed run may.
    opened.define_metric("*", step_metric="step")
    return opened


class MetricsWriter:
    """Writes WORKDIR/metrics.jsonl and TensorBoard events, and shows a progress bar.

    Of several processes only the first writes.

    Args:
      workdir: of the run.
      start_step: steps done before.
      steps: of the whole run.
      batch_size: examples a step.
      enabled: whether this process writes.
      cost: of one example, if it is known: `mfu` is logged then.
      wandb: None: nothing goes there.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        start_step: int,
        steps: int,
        batch_size: int,
        enabled: bool = True,
        cost: StepCost | None = None,
        wandb: WandbRun | None = None,
    ):
        self.clock = StepClock()
        self._enabled, self._cost, self._batch_size = enabled, cost, batch_size
        self._last_step = start_step
        if not enabled:
            return
        self._wandb = None if wandb is None else open_wandb(workdir, wandb)
        trim_lines(workdir / "metrics.jsonl", start_step)
        self._lines = _Lines(workdir / "metrics.jsonl")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=steps, initial=start_step, unit="step", desc=workdir.name, dynamic_ncols=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no part of training: neither the figures nor the bar's rate and time left count it."""
        with self.clock.pause():
            yield
        if self._enabled:
            self._bar.unpause()

    def advance(self) -> None:
        """One more step for the progress bar."""
        if self._enabled:
            self._bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line for the step, with the figures of the steps since the last line.

        They are `images_per_s`, the same for each device, seconds a step (see `StepClock`), the peak of memory and,
        where the cost of a step is known, the model FLOPs utilisation `mfu`, a fraction. A value that is not
        finite, as the loss of a skipped step, is null.
        """
        times = self.clock.take(step - self._last_step)
        self._last_step = step
        if not self._enabled:
            return
        rate = self._batch_size / max(sum(times.values()), 1e-9)
        devices = jax.device_count()
        line: dict[str, Any] = {
            "step": step,
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "images_per_s": round(rate, 3),
            "images_per_s_per_device": round(rate / devices, 3),
            **{name: round(value, 6) for name, value in times.items()},
        }
        if self._cost is not None:
            line["mfu"] = round(rate / devices * self._cost.flops / self._cost.peak_flops, 4)
        line |= memory_in_use()
        self._lines.append(json.dumps(line))
        shown = {name: value for name, value in line.items() if value is not None}
        for name, value in shown.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(shown)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{rate:.0f}")

    def pictures(self, step: int, grid: np.ndarray) -> None:
        """Adds a grid (H, W, 3) uint8 to TensorBoard, and to Weights & Biases."""
        if not self._enabled:
            return
        self._board.add_image("samples", grid, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"step": step, "samples": wandb.Image(grid)})

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._enabled:
            self._bar.write(text)

    def close(self) -> None:
        """Flushes and closes the files and the bar."""
        if self._enabled:
            self._board.close()
            self._bar.close()
            if self._wandb is not None:
                self._wandb.finish()
