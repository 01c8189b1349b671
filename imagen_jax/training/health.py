"""Losses and gradients that are not finite: noticed late without waiting, reported exactly.

The compiled step itself leaves the parameters as they were (see `make_train_step`); the host looks at its verdict
some steps later, when it is there anyway, and then says which step it was, which gradients and which records.
WORKDIR/nonfinite/STEP/ holds report.json and, where the run stops, all that is needed to see it again without the
records: config.json, batch.npz and the state before the step, as a checkpoint.
"""

import collections
import contextlib
import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from imagen_jax.config import build
from imagen_jax.data.pipeline import Batch
from imagen_jax.errors import UserError
from imagen_jax.files import AtomicFile, exists, make_folder, read_bytes, write_text
from imagen_jax.models.text_form import Text, zero_text
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_whole
from imagen_jax.parallel.processes import on_first
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import OnNonfinite, TrainConfig
from imagen_jax.training.config_file import read_config, write_config
from imagen_jax.training.keep import Keep
from imagen_jax.training.run import Run
from imagen_jax.training.state import TrainState, gradient_names
from imagen_jax.training.train_step import LOG_SNR_EDGES, StepMetrics, make_train_step, step_arrays

# Steps that are dispatched before the verdict on one is looked at: the devices never wait for the host. A fixed
# number, not "when it is ready": all processes must stop after the same step.
LAG = 4
_SHOWN = 3  # names in a message; report.json has all


def bin_name(number: int) -> str:
    """Name in the metrics of the mean loss in a bin of log-SNR, such as "loss_log_snr/-3..0"."""
    edges = ["", *(f"{edge:g}" for edge in LOG_SNR_EDGES), ""]
    return f"loss_log_snr/{edges[number]}..{edges[number + 1]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was not finite in a step."""

    step: int  # from 1
    loss: float | None  # of the batch; None: not finite
    grad_norm: float | None
    gradients: tuple[str, ...]  # parameters whose gradients are not finite, or too large to be squared
    inputs: tuple[str, ...]  # arrays of the batch that are not finite
    records: tuple[str, ...]  # keys of the examples whose losses are not finite
    batch: tuple[str, ...]  # keys of all examples, in the order of batch.npz
    newest_checkpoint: int | None  # step of the newest complete one, which is good

    def __str__(self) -> str:
        """One line."""
        value = {name: "not finite" if x is None else f"{x:.6g}" for name, x in self._numbers().items()}
        parts = [f"step {self.step}: loss {value['loss']}, gradient norm {value['grad_norm']}"]
        for what, names in (("gradients", self.gradients), ("inputs", self.inputs)):
            if names:
                parts.append(f"{what} that are not finite: {_some(names)}")
        if self.records:
            parts.append(f"records {_some(self.records)}")
        else:
            parts.append(f"every example's loss is finite, records of the batch {_some(self.batch)}")
        return "; ".join(parts)

    def _numbers(self) -> dict[str, float | None]:
        return {"loss": self.loss, "grad_norm": self.grad_norm}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _finite(value: jax.Array) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def make_report(
    step: int, metrics: StepMetrics, batch: Batch, names: Sequence[str], newest: int | None
) -> Report:
    """Says what was not finite.

    Args:
      step: number of the step.
      metrics: what it gave.
      batch: its examples, of all processes, with `key` and `index`.
      names: of the gradients, see `state.gradient_names`.
      newest: step of the newest complete checkpoint.
    """
    low, high = np.asarray(metrics["index"]).astype(np.uint64).T
    index, losses = (low + (high << np.uint64(32))).astype(np.int64), np.asarray(metrics["losses"])
    bad = set(index[~np.isfinite(losses)].tolist())
    finite = np.isfinite(np.asarray(metrics["tensor_squares"]))
    keys = [str(key) for key in batch["key"]]
    floating = [name for name in ("image", "low_res", "text") if name in batch]
    return Report(
        step=step,
        loss=_finite(metrics["loss"]),
        grad_norm=_finite(metrics["grad_norm"]),
        gradients=tuple(name for name, good in zip(names, finite, strict=True) if not good),
        inputs=tuple(n for n in floating if not np.isfinite(np.asarray(batch[n], np.float32)).all()),
        records=tuple(key for key, number in zip(keys, batch["index"].tolist()) if number in bad),
        batch=tuple(keys),
        newest_checkpoint=newest,
    )


def save_report(folder: epath.Path, report: Report) -> None:
    """Writes FOLDER/report.json."""
    make_folder(folder)
    write_text(folder / "report.json", json.dumps(dataclasses.asdict(report), indent=2) + "\n")


def save_batch(folder: epath.Path, batch: Batch, null: Text) -> None:
    """Writes FOLDER/batch.npz: all arrays that the step reads, and the keys of the batch, without pickle."""
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in step_arrays(batch).items()}
    for name, array in arrays.items():
        if array.dtype == jnp.bfloat16:
            arrays[name] = array.astype(np.float32)  # exact: bfloat16 has no name in NumPy's format
    arrays |= {"null_text": np.asarray(null.embeddings), "null_mask": np.asarray(null.mask)}
    arrays["index"] = np.asarray(batch["index"])
    arrays["key"] = np.array([str(key) for key in batch["key"]])
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    with AtomicFile(folder / "batch.npz") as file:
        file.write(packed.getbuffer())


def load_batch(folder: epath.Path) -> tuple[dict[str, Any], Text | None]:
    """Reads what `save_batch` wrote; the null text is None where an older version left it out.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = folder / "batch.npz"
    if not exists(path):
        raise UserError(f"--reproduce {folder}: it has no batch.npz; name a folder WORKDIR/nonfinite/STEP")
    content = io.BytesIO(read_bytes(path))
    try:
        with np.load(content, allow_pickle=False) as arrays:
            batch = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error or type(error).__name__})") from error
    if missing := {"index", "key"} - batch.keys():
        raise UserError(f"{path}: the array {min(missing)!r} is missing")
    embeddings, mask = batch.pop("null_text", None), batch.pop("null_mask", None)
    if embeddings is None:
        return batch, None
    if mask is None:  # an older version's, of padded text only, once for each example
        embeddings, mask = embeddings[0], np.ones(embeddings.shape[1], bool)
    return batch, Text(embeddings, mask)


class Health:
    """Looks at the verdicts of the steps, `LAG` steps behind them, and gathers what a line of metrics needs.

    Args:
      config: the run.
      workdir: of the run.
      read_batch: number of a step → its whole batch, of all processes, made anew; called on the first one only.
      null: → the null text.
      newest_checkpoint: → step of the newest complete checkpoint.
      say: prints a line.
      long_work: number of a step → context in which the run may take its time.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: epath.Path,
        *,
        read_batch: Callable[[int], Batch],
        null: Callable[[], Text],
        newest_checkpoint: Callable[[], int | None],
        say: Callable[[str], None],
        long_work: Callable[[int], contextlib.AbstractContextManager[None]],
    ):
        self._config, self._workdir = config, workdir
        self._read_batch, self._newest, self._say = read_batch, newest_checkpoint, say
        self._null = null
        self._long_work = long_work
        self._waiting: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._bins: list[tuple[jax.Array, jax.Array]] = []

    def note(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        """Takes the metrics of a step just dispatched and looks at those of `LAG` steps before.

        Args:
          step: its number, from 1.
          metrics: as the training step gives them.
          state: after it.

        Raises:
          UserError: a loss or gradient was not finite and the run stops; the step is saved.
        """
        self._waiting.append((step, metrics))
        self._check(LAG, state)

    def drain(self, state: TrainState) -> None:
        """Waits for all verdicts, as must be done before the state is saved; raises as `note` does."""
        self._check(0, state)

    def _check(self, left: int, state: TrainState) -> None:
        while len(self._waiting) > left:
            step, metrics = self._waiting.popleft()
            if bool(metrics["updated"]):
                self._bins.append((metrics["bin_loss"], metrics["bin_count"]))
            else:
                with self._long_work(step):
                    self._nonfinite(step, metrics, state)

    def _nonfinite(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        loop, folder = self._config.train, self._workdir / "nonfinite" / str(step)
        skipped = int(metrics["skipped"])
        skip = loop.on_nonfinite is OnNonfinite.SKIP and skipped <= loop.max_skipped
        said = on_first(lambda: self._report(step, metrics, gradient_names(state), folder, skip))
        if skip:
            self._say(f"skipped {said}; {skipped} of at most {loop.max_skipped} skipped; {folder}")
            return
        # The steps since then have left the state as it was, but for its number; all processes save it.
        with contextlib.closing(Checkpoints(folder, keep=Keep())) as checkpoints:
            examples = (step - 1) * self._config.data.batch_size
            before = state._replace(step=state.step - 1)
            checkpoints.save(step - 1, before, examples=examples, config=self._config)
        limit = f" (after {loop.max_skipped} skipped steps)" if loop.on_nonfinite is OnNonfinite.SKIP else ""
        raise UserError(
            f"{self._workdir}: not finite{limit}: {said}; see it again with: "
            f"imagen-jax train --reproduce={folder}"
        )

    def _report(
        self, step: int, metrics: StepMetrics, names: Sequence[str], folder: epath.Path, skip: bool
    ) -> str:
        """Writes what is to be kept of a step, but for the state; says what was not finite."""
        batch = self._read_batch(step)
        report = make_report(step, metrics, batch, names, self._newest())
        save_report(folder, report)
        if not skip:
            write_config(folder, self._config)
            save_batch(folder, batch, self._null())
        return f"{report}; newest checkpoint: step {report.newest_checkpoint}"

    def take_bins(self) -> dict[str, float]:
        """Mean loss in each bin of log-SNR over the steps looked at since the last call."""
        if not self._bins:
            return {}
        losses, counts = np.sum(np.asarray(jax.device_get(self._bins), np.float64), axis=0).tolist()
        self._bins = []
        return {bin_name(i): loss / count for i, (loss, count) in enumerate(zip(losses, counts)) if count}


def reproduce(folder: epath.PathLike) -> Report:
    """Runs the step saved in WORKDIR/nonfinite/STEP again, on the devices that there are.

    Returns:
      What is not finite now; the same as then unless it came from the hardware.

    Raises:
      UserError: the folder is none of these.
    """
    folder = epath.Path(folder)
    batch, null = load_batch(folder)
    config = build(TrainConfig, read_config(folder), f"{folder}/config.json")
    count = math.gcd(len(batch["index"]) // config.train.accumulate, jax.device_count())
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:count])
    run = Run.of(config, mesh)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        before = checkpoints.latest_step()
        if before is None:
            raise UserError(f"--reproduce {folder}: it has no checkpoint")
        state, _ = checkpoints.restore(before, run.abstract)
    placed = put_batch(step_arrays(batch), mesh)
    names = gradient_names(state)
    if null is None:
        null = zero_text(config.stage.max_text_length, config.stage.network.text_width)
    _, metrics = make_train_step(run)(state, placed, put_whole(null, mesh))
    return make_report(before + 1, metrics, batch, names, before)
