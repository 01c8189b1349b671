"""The training loop of any stage."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from imagen_jax.data.pipeline import Batches, PipelineConfig, embedding_width, open_batches, record_count
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import DataShare, check_batch_size, data_share, make_mesh, put_batch
from imagen_jax.parallel.processes import on_first
from imagen_jax.parallel.watchdog import Phase, Watchdog
from imagen_jax.sampling.pictures import grid, save_png
from imagen_jax.sampling.stage_sampler import StageSampler
from imagen_jax.training.checkpoint import Checkpoints, Keep, check_same_config, write_config
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.lock import WorkdirLock
from imagen_jax.training.metrics import MetricsWriter
from imagen_jax.training.online import OnlineText, TokenizedBatches
from imagen_jax.training.state import TrainState, abstract_state, init_state, make_optimizer
from imagen_jax.training.train_step import make_train_step

WHOLE_BATCH = DataShare(index=0, count=1)


def pipeline_config(config: TrainConfig) -> PipelineConfig:
    """The input pipeline that a training config asks for."""
    stage, data = config.stage, config.data
    return PipelineConfig(
        path=data.path,
        split=data.split,
        resolution=stage.resolution,
        low_resolution=stage.low_resolution,
        crop=stage.crop,
        max_text_length=stage.max_text_length,
        batch_size=data.batch_size,
        seed=config.seed,
        flip=data.flip,
        num_threads=data.num_threads,
        prefetch=data.prefetch,
    )


def check_data(config: TrainConfig, online: OnlineText | None) -> None:
    """Checks the records against the config before anything is compiled.

    Args:
      config: the run.
      online: the encoder that runs beside it, if there is one.

    Raises:
      UserError: if the split is smaller than a batch or the embeddings' width is not the network's.
    """
    data = config.data
    if online is None:
        place = data.embeddings or data.path
        width, what = embedding_width(place), f"the embeddings in {place}"
    else:
        width, what = online.width, f"the embeddings of text encoder {data.text_encoder}"
    if width != config.stage.network.text_width:
        raise UserError(
            f"config.stage.network.text_width is {config.stage.network.text_width}, but {what} have width {width}"
        )
    count = record_count(data.path, data.split)
    if count < data.batch_size:
        raise UserError(
            f"config.data.batch_size={data.batch_size}, but split {data.split!r} of {data.path} "
            f"holds only {count} records"
        )


def split_index(index: np.ndarray) -> np.ndarray:
    """Example indices int64 (N,) as low and high 32 bits, uint32 (N, 2): JAX runs without 64-bit types."""
    unsigned = index.astype(np.uint64)
    return np.stack([unsigned & np.uint64(0xFFFFFFFF), unsigned >> np.uint64(32)], axis=1).astype(np.uint32)


def device_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, online: OnlineText | None = None
) -> dict[str, jax.Array]:
    """The arrays that the training step reads, on the mesh; record keys stay behind.

    Args:
      batch: from `open_batches`, or with an encoder from `TokenizedBatches`.
      mesh: where to.
      online: the encoder of the batch's tokens.
    """
    arrays = {name: array for name, array in batch.items() if name not in ("key", "index", "tokens")}
    placed = put_batch({**arrays, "index": split_index(batch["index"])}, mesh)
    if online is not None:
        placed["text"] = online.embed(batch["tokens"], batch["text_mask"])
    return placed


class SampleGrid:
    """Pictures of the same captions and seeds, drawn now and then with the averaged weights."""

    def __init__(
        self,
        config: TrainConfig,
        network: StageNetwork,
        workdir: epath.Path,
        mesh: Mesh,
        online: OnlineText | None,
    ):
        loop, pipeline = config.train, pipeline_config(config)
        split = loop.sample_split or config.data.split
        count = min(loop.sample_count, record_count(config.data.path, split))
        pipeline = dataclasses.replace(pipeline, split=split, shuffle=False, batch_size=count, crop=None)
        with _open_batches(config, pipeline) as batches:
            self._batch = dict(next(batches))
        if online is not None:
            self._batch["text"], self._batch["text_mask"] = online.encode(self._batch["caption"])
        self._seeds = np.arange(count, dtype=np.uint32)
        self._sampler = StageSampler(network)
        self._folder = workdir / "samples"

    def draw(self, state: TrainState) -> np.ndarray:
        """Writes WORKDIR/samples/STEP.png (for an SR stage: input above output); returns the grid."""
        pictures = self._sampler(
            state.ema,
            seeds=self._seeds,
            text=self._batch["text"].astype(np.float32),
            mask=self._batch["text_mask"],
            low_res=self._batch.get("low_res"),
        )
        result = grid(list(pictures))
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_png(self._folder / f"{int(state.step):08d}.png", result)
        return result


def _open_batches(config: TrainConfig, pipeline: PipelineConfig, **options: int) -> Batches:
    """The batches with what their text is made of."""
    data = config.data
    return open_batches(
        pipeline, embeddings=data.embeddings, captions=data.text_encoder is not None, **options
    )


def training_batches(
    config: TrainConfig, online: OnlineText | None, examples: int, share: DataShare = WHOLE_BATCH
) -> Batches | TokenizedBatches:
    """Batches, or this process's share of them, from the given global count of examples on."""
    batches = _open_batches(
        config,
        pipeline_config(config),
        start_example=examples,
        process_index=share.index,
        process_count=share.count,
    )
    return batches if online is None else TokenizedBatches(batches, online, ahead=config.data.prefetch)


def _online_text(config: TrainConfig, mesh: Mesh) -> OnlineText | None:
    """The encoder that runs beside the training, if the config asks for one."""
    if config.data.text_encoder is None:
        return None
    return OnlineText.load(
        config.data.text_encoder,
        dtype=config.data.text_dtype.value,
        max_length=config.stage.max_text_length,
        mesh=mesh,
    )


def _start_workdir(config: TrainConfig, workdir: epath.Path) -> WorkdirLock:
    """Takes the work directory for this run; process 0's part."""
    if (workdir / "config.json").exists():
        check_same_config(workdir, config)
    lock = WorkdirLock(workdir)
    if not lock.held:
        print(
            f"{workdir}: nothing keeps a second run out of a cloud folder; see that there is none", flush=True
        )
    try:
        write_config(workdir, config)
    except BaseException:
        lock.close()
        raise
    return lock


@contextlib.contextmanager
def _locked(config: TrainConfig, workdir: epath.Path) -> Iterator[None]:
    """The work directory is this run's; refused on all processes if process 0 does not get it."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.callback(_start_workdir(config, workdir).close)

        on_first(take)
        yield


def train(
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    watchdog: Watchdog | None = None,
    stop: Callable[[int], bool] | None = None,
) -> TrainState:
    """Trains a stage, going on from the newest checkpoint of `workdir` that is intact.

    Every step depends on the config, the seed and the records only: a run that was interrupted at any moment
    gives, bit for bit on the same devices, the losses of one that was not. In a job of several processes all
    call this with the same arguments; each reads its own part of the data, and `workdir` is a folder that all see.

    Args:
      config: what to train.
      workdir: gets config.json, metrics.jsonl, checkpoints/, samples/ and tensorboard/.
      watchdog: is told where the loop is; None: nobody watches.
      stop: asked after every step, on all processes with the same answer, whether to save and return early.

    Returns:
      The last state.

    Raises:
      UserError: for records that do not fit the config, a work directory of another config or in use, a mesh
        that does not fit the devices, a checkpoint that cannot be saved, or a loss that is not finite.
    """
    workdir = epath.Path(workdir)
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh, "config.data.batch_size")
    share = data_share(mesh)
    if config.data.text_encoder is not None and share.count != jax.process_count():
        raise UserError(
            f"config.mesh.tensor={config.mesh.tensor} spreads over several processes, which config.data.text_encoder "
            "does not: lower it, or encode beforehand with imagen-jax precompute"
        )
    online = _online_text(config, mesh)
    check_data(config, online)
    first, loop = jax.process_index() == 0, config.train
    network = StageNetwork(config.stage)
    optimizer = make_optimizer(config.optimizer, loop.steps)
    keep = Keep(
        newest=loop.keep_checkpoints, every=loop.keep_every, best=loop.keep_best, best_is=loop.best_is
    )
    with (
        _locked(config, workdir),
        contextlib.closing(Checkpoints(workdir, keep=keep)) as checkpoints,
    ):
        abstract = abstract_state(network, optimizer, mesh)
        found = checkpoints.restore_newest(abstract)
        if found is None:
            state, examples, step = init_state(network, optimizer, config, mesh), 0, 0
        else:
            state, examples, step = found
        if first:
            several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
            print(
                f"{config.stage.name}: {network.parameter_count() / 1e6:.2f} M parameters, "
                f"{len(mesh.devices.flat)} device(s){several}, step {step} of {loop.steps}",
                flush=True,
            )
        if step >= loop.steps:
            return state
        metrics = MetricsWriter(
            workdir, start_step=step, steps=loop.steps, batch_size=config.data.batch_size, enabled=first
        )
        with contextlib.closing(metrics), training_batches(config, online, examples, share) as batches:
            run = _Run(
                config, workdir, network, mesh, checkpoints, metrics, online, watchdog or Watchdog(), stop
            )
            return run.loop(state, step, make_train_step(network, optimizer, config, mesh, abstract), batches)


class _Run:
    """The loop and what happens between its steps, in one fixed order: step, log, sample, save, stop."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: epath.Path,
        network: StageNetwork,
        mesh: Mesh,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        online: OnlineText | None,
        watchdog: Watchdog,
        stop: Callable[[int], bool] | None,
    ):
        self.config, self.workdir, self.network, self.mesh = config, workdir, network, mesh
        self.checkpoints, self.metrics, self.online = checkpoints, metrics, online
        self.watchdog, self.stop = watchdog, stop
        self._grid: SampleGrid | None = None
        self._best: float | None = None  # newest value of the metric by which the best checkpoints are kept

    def loop(self, state: TrainState, step: int, train_step: Any, batches: Iterator[Any]) -> TrainState:
        """Steps from `step` + 1 to the last, or until stopped; the last state is saved."""
        loop, start = self.config.train, step
        # The next batch is put on the devices while they work on this one.
        batch = self._next(step + 1, batches)
        while step < loop.steps:
            # The first step compiles.
            self.watchdog.at(step + 1, Phase.STEP if step > start else Phase.LONG)
            state, values = train_step(state, batch)
            step += 1
            stopping = self.stop is not None and self.stop(step)
            last = step == loop.steps or stopping
            if not last:
                batch = self._next(step + 1, batches)
            self.metrics.advance()
            if step % loop.log_every == 0 or last:
                self.watchdog.at(step + 1, Phase.LOG)
                self._log(step, values)
            if loop.sample_every and (step % loop.sample_every == 0 or last) and not stopping:
                self._sample(step, state)
            if step % loop.checkpoint_every == 0 or last:
                self._save(step, state)
            if stopping:
                break
        with self.watchdog.long_work(step):
            self.checkpoints.wait()
        return state

    def _next(self, step: int, batches: Iterator[Any]) -> dict[str, jax.Array]:
        """The batch of a step, on its way to the devices."""
        self.watchdog.at(step, Phase.DATA)
        return device_batch(next(batches), self.mesh, self.online)

    def _log(self, step: int, values: Mapping[str, jax.Array]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        if not all(math.isfinite(number) for number in numbers.values()):
            raise UserError(
                f"{self.workdir}: {numbers} at step {step} is not finite; the newest checkpoint is from step "
                f"{self.checkpoints.latest_step()}"
            )
        self._best = numbers.get(self.config.train.best_metric, self._best)
        self.metrics.log(step, numbers)
        self.checkpoints.check()

    def _save(self, step: int, state: TrainState) -> None:
        """Begins to save; waits for the save before this one, if it is still going on."""
        examples = step * self.config.data.batch_size
        with self.watchdog.long_work(step):
            self.checkpoints.save(step, state, examples=examples, config=self.config, metric=self._best)

    def _sample(self, step: int, state: TrainState) -> None:
        with self.watchdog.long_work(step):
            if self._grid is None:
                self._grid = SampleGrid(self.config, self.network, self.workdir, self.mesh, self.online)
            self.metrics.pictures(step, self._grid.draw(state))
            self.metrics.pause()
