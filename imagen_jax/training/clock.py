"""Where the time of a run goes, what it holds in memory, and a profiler's trace of chosen steps."""

import contextlib
import dataclasses
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import copy_file, files_below, is_cloud, make_folder


class StepClock:
    """Splits the time of a training loop into waiting for data, the step, and the rest.

    Steps are dispatched ahead of the devices. A loop that has data enough waits for the devices, which counts as
    the step; one that has not waits in `data` while they stand still.
    """

    def __init__(self) -> None:
        self._spent = {"data": 0.0, "step": 0.0, "pause": 0.0}
        self._since = time.monotonic()

    @contextlib.contextmanager
    def _timing(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - start

    def data(self) -> contextlib.AbstractContextManager[None]:
        """Around the wait for the next batch."""
        return self._timing("data")

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Around dispatching a step and waiting for its results."""
        return self._timing("step")

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Around what is no part of training, such as drawing samples: it is left out of all figures."""
        return self._timing("pause")

    def take(self, steps: int) -> dict[str, float]:
        """Seconds a step since the last call: `data_s`, `step_s`, `rest_s`; their sum is the whole but pauses."""
        now, spent = time.monotonic(), self._spent
        whole = now - self._since - spent["pause"]
        self._since, self._spent = now, dict.fromkeys(spent, 0.0)
        parts = (spent["data"], spent["step"], max(0.0, whole - spent["data"] - spent["step"]))
        return {
            name: part / max(steps, 1)
            for name, part in zip(("data_s", "step_s", "rest_s"), parts, strict=True)
        }


def memory_in_use() -> dict[str, float]:
    """Peak memory, GiB: `device_peak_gib` of the first device where it tells, else `host_peak_gib` of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"device_peak_gib": round(stats["peak_bytes_in_use"] / 2**30, 4)}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_peak_gib": round(peak / 2**30, 4)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSteps:
    """Steps whose execution is traced, the last one included."""

    first: int  # from 1
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfileSteps":
        """Reads "FIRST:LAST".

        Raises:
          UserError: it is not of that form, or ends before it begins.
        """
        match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--profile_steps {text}: give FIRST:LAST, such as 100:105")
        return cls(first=int(match[1]), last=int(match[2]))


class Profiler:
    """Writes a trace of some steps to WORKDIR/profile, for TensorBoard's profiler, XProf and Perfetto."""

    def __init__(self, workdir: epath.Path, steps: ProfileSteps | None):
        self._folder, self._steps, self._running = workdir / "profile", steps, False
        self._local = ""  # where JAX writes

    def before(self, step: int, state: Any) -> None:
        """To be called before a step, with the arrays of the step before: the trace begins when they are done."""
        if self._steps is not None and self._steps.first <= step <= self._steps.last and not self._running:
            jax.block_until_ready(state)
            # JAX writes to local folders only.
            self._local = (
                tempfile.mkdtemp() if is_cloud(self._folder) else os.fspath(make_folder(self._folder))
            )
            jax.profiler.start_trace(self._local)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """To be called after a step, with its arrays: the trace ends when they are done."""
        if self._running and self._steps is not None and step >= self._steps.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace, even if the run ends before the last step to be traced."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if is_cloud(self._folder):
                for file in files_below(epath.Path(self._local)):
                    copy_file(file, self._folder / file.relative_to(self._local))
                shutil.rmtree(self._local)
