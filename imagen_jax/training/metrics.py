"""Metrics as JSON lines and TensorBoard events."""

import json
import time
from collections.abc import Mapping

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from imagen_jax.data.files import write_text


def trim_lines(path: epath.Path, last_step: int) -> None:
    """Drops the lines of a metrics file that come after `last_step`, and a line cut off by a crash.

    A resumed run logs those steps again, so that the file keeps one line a step.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class MetricsWriter:
    """Writes WORKDIR/metrics.jsonl and TensorBoard events, and shows a progress bar.

    Of several processes only the first writes.
    """

    def __init__(
        self, workdir: epath.Path, *, start_step: int, steps: int, batch_size: int, enabled: bool = True
    ):
        self._enabled = enabled
        self._batch_size = batch_size
        self._path = workdir / "metrics.jsonl"
        self._last = (start_step, time.monotonic())
        if not enabled:
            return
        trim_lines(self._path, start_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=steps, initial=start_step, unit="step", desc=workdir.name, dynamic_ncols=True)

    def advance(self) -> None:
        """One more step for the progress bar."""
        if self._enabled:
            self._bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line for the step; adds `images_per_s` since the last line."""
        last_step, last_time = self._last
        now = time.monotonic()
        rate = (step - last_step) * self._batch_size / max(now - last_time, 1e-9)
        self._last = (step, now)
        if not self._enabled:
            return
        line = {"step": step, **values, "images_per_s": round(rate, 3)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{rate:.0f}")

    def pictures(self, step: int, grid: np.ndarray) -> None:
        """Adds a grid (H, W, 3) uint8 to TensorBoard."""
        if self._enabled:
            self._board.add_image("samples", grid, step, dataformats="HWC")

    def pause(self) -> None:
        """Leaves the time until now out of the next rate: it was not spent on steps."""
        self._last = (self._last[0], time.monotonic())

    def close(self) -> None:
        """Flushes and closes the files and the bar."""
        if self._enabled:
            self._board.close()
            self._bar.close()
