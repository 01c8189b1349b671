"""The training loop of any stage."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from imagen_jax.config import to_dict
from imagen_jax.data.pipeline import Batches, PipelineConfig, embedding_width, open_batches, record_count
from imagen_jax.errors import UserError
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import check_batch_size, make_mesh, put_batch
from imagen_jax.training.checkpoint import Checkpoints, check_same_config, write_config
from imagen_jax.training.clock import Profiler, ProfileSteps
from imagen_jax.training.config import Scorer, TrainConfig
from imagen_jax.training.health import Health
from imagen_jax.training.held_out import HeldOutLoss, SampleGrid, check_scorer
from imagen_jax.training.init_from import check_record, initial_params, recorded_source, write_record
from imagen_jax.training.metrics import MetricsWriter, StepCost, WandbRun
from imagen_jax.training.online import OnlineText, TokenizedBatches
from imagen_jax.training.state import TrainState, abstract_state, init_state, make_optimizer, state_of_params
from imagen_jax.training.train_step import check_accumulation, make_train_step, split_index


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
      UserError: if the split is smaller than a batch, the embeddings' width is not the network's, there are no
        held-out records, or the samples cannot be scored.
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
    if config.train.eval_every:
        record_count(data.path, config.train.eval_split)
    if config.train.sample_every and config.train.sample_score is not Scorer.NONE:
        check_scorer(config.train.sample_score, config.stage.resolution, sample_batch(config)["caption"])


def device_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, online: OnlineText | None = None
) -> dict[str, jax.Array]:
    """The arrays that the training step reads, on the mesh; record keys stay behind.

    Args:
      batch: from `open_batches`, or with an encoder from `TokenizedBatches`.
      mesh: where to.
      online: the encoder of the batch's tokens.
    """
    left_out = ("key", "index", "tokens", "caption")
    arrays = {name: array for name, array in batch.items() if name not in left_out}
    placed = put_batch({**arrays, "index": split_index(batch["index"])}, mesh)
    if online is not None:
        placed["text"] = online.embed(batch["tokens"], batch["text_mask"])
    return placed


def _open_batches(config: TrainConfig, pipeline: PipelineConfig, **options: int) -> Batches:
    """The batches with what their text is made of."""
    data = config.data
    captions = data.text_encoder is not None or config.train.sample_score is not Scorer.NONE
    return open_batches(pipeline, embeddings=data.embeddings, captions=captions, **options)


def training_batches(
    config: TrainConfig, online: OnlineText | None, examples: int, pipeline: PipelineConfig | None = None
) -> Batches | TokenizedBatches:
    """Batches of this process from the given global count of examples on.

    Args:
      config: the run.
      online: the encoder that runs beside it, if there is one.
      examples: used before.
      pipeline: None: that of the training.
    """
    batches = _open_batches(
        config,
        pipeline or pipeline_config(config),
        start_example=examples,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return batches if online is None else TokenizedBatches(batches, online, ahead=config.data.prefetch)


def whole_batch(config: TrainConfig, online: OnlineText | None, step: int) -> dict[str, Any]:
    """The batch of a step (from 1) with the examples of all processes, made anew; `text` is on the host."""
    examples = (step - 1) * config.data.batch_size
    with _open_batches(config, pipeline_config(config), start_example=examples) as batches:
        batch = dict(next(batches))
    if online is not None:
        batch["text"], batch["text_mask"] = online.encode(batch["caption"])
    return batch


def sample_batch(config: TrainConfig) -> dict[str, Any]:
    """The first examples of the split that sample grids are drawn for."""
    split = config.train.sample_split or config.data.split
    count = min(config.train.sample_count, record_count(config.data.path, split))
    pipeline = dataclasses.replace(
        pipeline_config(config), split=split, shuffle=False, batch_size=count, crop=None
    )
    with _open_batches(config, pipeline) as batches:
        return dict(next(batches))


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


def _start(
    config: TrainConfig,
    network: StageNetwork,
    optimizer: optax.GradientTransformation,
    workdir: epath.Path,
    mesh: Mesh,
    init_from: str | None,
) -> TrainState:
    """The state of step 0: fresh weights, or those that --init_from names or once named."""
    spec = init_from or recorded_source(workdir)
    if spec is None:
        return init_state(network, optimizer, config, mesh)
    params, record = initial_params(spec, config, mesh)
    write_record(workdir, record)
    return state_of_params(params, optimizer, config, mesh)


def train(
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    init_from: str | None = None,
    profile: ProfileSteps | None = None,
    cost: StepCost | None = None,
    wandb_project: str | None = None,
) -> TrainState:
    """Trains a stage, going on from the newest checkpoint of `workdir`.

    Every step depends on the config, the seed and the records only: a run that was interrupted at any moment
    gives, bit for bit on the same devices, the losses of one that was not.

    Args:
      config: what to train.
      workdir: gets config.json, metrics.jsonl, checkpoints/, samples/ and tensorboard/.
      init_from: where the weights of step 0 come from, see `initial_params`; None: they are fresh.
      profile: steps whose execution is traced.
      cost: of one example's step, for `mfu` in the metrics.
      wandb_project: in Weights & Biases; None: nothing is logged there.

    Returns:
      The last state.

    Raises:
      UserError: for records that do not fit the config, a work directory of another config, a mesh that does
        not fit the devices, weights that do not fit the network, or a loss or gradient that is not finite.
    """
    workdir = epath.Path(workdir)
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh, "config.data.batch_size")
    check_accumulation(config, mesh)
    online = _online_text(config, mesh)
    check_data(config, online)
    first = jax.process_index() == 0
    if (workdir / "config.json").exists():
        check_same_config(workdir, config)
    network = StageNetwork(config.stage)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with contextlib.closing(Checkpoints(workdir, keep=config.train.keep_checkpoints)) as checkpoints:
        abstract = abstract_state(network, optimizer, mesh, config.train.ema_decays)
        step, examples = checkpoints.latest_step(), 0
        if step is None:
            state, step = _start(config, network, optimizer, workdir, mesh, init_from), 0
        else:
            check_record(workdir, init_from)
            state, examples = checkpoints.restore(step, abstract)
        if first:
            write_config(workdir, config)
            print(
                f"{config.stage.name}: {network.parameter_count() / 1e6:.2f} M parameters, "
                f"{len(mesh.devices.flat)} device(s), step {step} of {config.train.steps}",
                flush=True,
            )
        if step >= config.train.steps:
            return state
        metrics = MetricsWriter(
            workdir,
            start_step=step,
            steps=config.train.steps,
            batch_size=config.data.batch_size,
            enabled=first,
            cost=cost,
            wandb=WandbRun(project=wandb_project, config=to_dict(config)) if wandb_project else None,
        )
        with (
            contextlib.closing(metrics),
            contextlib.closing(Profiler(workdir, profile)) as profiler,
            training_batches(config, online, examples) as batches,
        ):
            run = _Run(config, workdir, network, mesh, checkpoints, metrics, online, profiler)
            return run.loop(state, step, make_train_step(network, optimizer, config, mesh, abstract), batches)


class _Run:
    """The loop and what happens between its steps, in one fixed order: step, look, log, save."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: epath.Path,
        network: StageNetwork,
        mesh: Mesh,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        online: OnlineText | None,
        profiler: Profiler,
    ):
        self.config, self.workdir, self.network, self.mesh = config, workdir, network, mesh
        self.checkpoints, self.metrics, self.online, self.profiler = checkpoints, metrics, online, profiler
        self.health = Health(
            config,
            workdir,
            read_batch=lambda step: whole_batch(config, online, step),
            newest_checkpoint=checkpoints.latest_step,
            say=metrics.say,
        )
        self._grid: SampleGrid | None = None
        self._held_out: HeldOutLoss | None = None

    def loop(self, state: TrainState, step: int, train_step: Any, batches: Iterator[Any]) -> TrainState:
        """Steps from `step` + 1 to the last; the last state is saved."""
        loop, clock = self.config.train, self.metrics.clock
        batch = self._next(batches)
        while step < loop.steps:
            self.profiler.before(step + 1, state)
            with clock.step():
                state, values = train_step(state, batch)
            step += 1
            last = step == loop.steps
            if not last:
                # The next batch is put on the devices while they work on this one.
                batch = self._next(batches)
            with clock.step():
                self.health.note(step, values, state)
            self.profiler.after(step, state)
            self.metrics.advance()
            seen = self._look(step, state, last)
            if step % loop.log_every == 0 or last or seen:
                self._log(step, values, state, seen)
            if step % loop.checkpoint_every == 0 or last:
                self._drain(state)
                examples = step * self.config.data.batch_size
                self.checkpoints.save(step, state, examples=examples, config=self.config)
        self.checkpoints.wait()
        return state

    def _next(self, batches: Iterator[Any]) -> dict[str, jax.Array]:
        with self.metrics.clock.data():
            batch = next(batches)
        return device_batch(batch, self.mesh, self.online)

    def _drain(self, state: TrainState) -> None:
        with self.metrics.clock.step():
            self.health.drain(state)

    def _log(
        self, step: int, values: Mapping[str, jax.Array], state: TrainState, seen: dict[str, float]
    ) -> None:
        self._drain(state)
        scalars = ("loss", "grad_norm", "learning_rate", "skipped")
        numbers = {name: values[name].item() for name in scalars}
        self.metrics.log(step, numbers | self.health.take_bins() | seen)

    def _look(self, step: int, state: TrainState, last: bool) -> dict[str, float]:
        """Held-out loss and sample grid where they are due; their figures. The time is no part of training."""
        loop, seen = self.config.train, {}
        evaluate = bool(loop.eval_every) and (step % loop.eval_every == 0 or last)
        # Sampling runs on one process: the averaged weights are spread over all.
        draw = bool(loop.sample_every) and (step % loop.sample_every == 0 or last)
        draw = draw and jax.process_count() == 1
        if not evaluate and not draw:
            return {}
        self._drain(state)
        with self.metrics.clock.pause():
            if evaluate:
                self._held_out = self._held_out or self._make_held_out()
                seen = self._held_out({name: state.ema[name] for name in state.params})
            if draw:
                self._grid = self._grid or SampleGrid(
                    self.config, self.network, self.workdir, sample_batch(self.config), self.online
                )
                pictures, scores = self._grid.draw(state)
                self.metrics.pictures(step, pictures)
                seen |= scores
        return seen

    def _make_held_out(self) -> HeldOutLoss:
        return HeldOutLoss(
            self.config,
            self.network,
            self.mesh,
            pipeline_config(self.config),
            lambda pipeline: training_batches(self.config, self.online, 0, pipeline),
            lambda batch: device_batch(batch, self.mesh, self.online),
        )
