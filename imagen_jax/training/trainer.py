"""The training loop of any stage."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from imagen_jax.config import to_dict
from imagen_jax.data.encoder_identity import EncoderIdentity
from imagen_jax.data.pipeline import Batches, TextCount
from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import DataShare, check_batch_size, data_share, make_mesh, put_whole
from imagen_jax.parallel.processes import gather, on_first
from imagen_jax.parallel.watchdog import Phase, Watchdog
from imagen_jax.progress import elapsed
from imagen_jax.training.batches import (
    check_data,
    device_batch,
    null_text,
    online_text,
    pipeline_config,
    training_batches,
    whole_batch,
)
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.clock import Profiler, ProfileSteps
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.health import Health
from imagen_jax.training.held_out import HeldOutLoss, SampleGrid
from imagen_jax.training.init_from import (
    check_record,
    check_source,
    initial_params,
    recorded_source,
    write_record,
)
from imagen_jax.training.keep import Keep
from imagen_jax.training.metrics import MetricsWriter, StepCost, WandbRun
from imagen_jax.training.objectives import Objective
from imagen_jax.training.online import OnlineText, TokenizedBatches
from imagen_jax.training.run import Run
from imagen_jax.training.run_encoder import data_encoder, resumed_encoder, write_encoder
from imagen_jax.training.sample_inputs import check_sample_inputs, sample_inputs
from imagen_jax.training.state import TrainState
from imagen_jax.training.train_step import check_accumulation, make_train_step
from imagen_jax.training.workdir import taken_workdir


def start_state(
    run: Run, workdir: epath.Path, init_from: str | None, encoder: EncoderIdentity | None
) -> TrainState:
    """The state of step 0: fresh weights, or those that --init_from names or once named."""
    spec = init_from or recorded_source(workdir)
    if spec is None:
        return run.init()
    params, record = initial_params(spec, run.config, run.mesh, encoder)
    write_record(workdir, record)
    return run.start_from(params)


def _checked_mesh(config: TrainConfig) -> tuple[Mesh, DataShare]:
    """The devices of a run, and this process's share of its batches.

    Raises:
      UserError: the config cannot be trained, or does not fit the devices.
    """
    config.check_trainable()
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh, "config.data.batch_size")
    check_accumulation(config, mesh)
    share = data_share(mesh)
    if config.data.text_encoder is not None and share.count != jax.process_count():
        raise UserError(
            f"config.mesh.tensor={config.mesh.tensor} spreads over several processes, which config.data.text_encoder "
            "does not: lower it, or encode beforehand with imagen-jax precompute"
        )
    return mesh, share


def _begin(
    run: Run,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    init_from: str | None,
    encoder: EncoderIdentity | None,
) -> tuple[TrainState, int, int, EncoderIdentity | None]:
    """Where a run goes on: its state, the examples and steps before it, and the text encoder of its data."""
    if on_first(checkpoints.latest_step) is not None:
        check_record(workdir, init_from)
    found = checkpoints.restore_newest(run.abstract)
    if found is None:
        state, examples, step = start_state(run, workdir, init_from, encoder), 0, 0
    else:
        state, examples, step = found
        encoder = resumed_encoder(workdir, run.config.data, checkpoints.encoder(step), encoder)
    on_first(lambda: write_encoder(workdir, encoder))
    if jax.process_index() == 0:
        several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        print(
            f"{run.config.stage.name}: {run.network.parameter_count() / 1e6:.2f} M parameters, "
            f"{len(run.mesh.devices.flat)} device(s){several}, step {step} of {run.config.train.steps}",
            flush=True,
        )
    return state, examples, step, encoder


def train(
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    watchdog: Watchdog | None = None,
    stop: Callable[[int], bool] | None = None,
    init_from: str | None = None,
    profile: ProfileSteps | None = None,
    cost: StepCost | None = None,
    wandb_project: str | None = None,
    objective: Objective | None = None,
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
      init_from: where the weights of step 0 come from, see `initial_params`; None: they are fresh.
      profile: steps whose execution is traced.
      cost: of one example's step, for `mfu` in the metrics.
      wandb_project: in Weights & Biases; None: nothing is logged there.
      objective: what is learned; None: to denoise, as the config says.

    Returns:
      The last state.

    Raises:
      UserError: for records that do not fit the config, a work directory of another config or in use, a mesh
        that does not fit the devices, weights that do not fit the network, a checkpoint that cannot be saved, or
        a loss or gradient that is not finite.
    """
    workdir = epath.Path(workdir)
    mesh, share = _checked_mesh(config)
    online = online_text(config, mesh)
    check_data(config, online)
    if config.train.sample_every:
        check_sample_inputs(config)
    encoder = data_encoder(config.data, online)
    if init_from is not None and not (workdir / "config.json").exists():
        check_source(init_from, config)
    run, loop = Run.of(config, mesh, objective), config.train
    keep = Keep(
        newest=loop.keep_checkpoints, every=loop.keep_every, best=loop.keep_best, best_is=loop.best_is
    )
    with (
        taken_workdir(config, workdir, encoder),
        contextlib.closing(Checkpoints(workdir, keep=keep)) as checkpoints,
    ):
        state, examples, step, encoder = _begin(run, workdir, checkpoints, init_from, encoder)
        if step >= loop.steps:
            return state
        metrics = MetricsWriter(
            workdir,
            start_step=step,
            steps=loop.steps,
            batch_size=config.data.batch_size,
            enabled=jax.process_index() == 0,
            cost=cost,
            wandb=WandbRun(project=wandb_project, config=to_dict(config)) if wandb_project else None,
        )
        with (
            contextlib.closing(metrics),
            contextlib.closing(Profiler(workdir, profile)) as profiler,
            training_batches(config, online, examples, share) as batches,
        ):
            guard = watchdog or Watchdog()
            steps = _Loop(run, workdir, checkpoints, metrics, online, encoder, profiler, guard, stop)
            return steps.run(state, step, make_train_step(run), batches)


class _Loop:
    """The loop and what happens between its steps, in one fixed order: step, look, log, save, stop."""

    def __init__(
        self,
        run: Run,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        online: OnlineText | None,
        encoder: EncoderIdentity | None,
        profiler: Profiler,
        watchdog: Watchdog,
        stop: Callable[[int], bool] | None,
    ):
        self.of, self.workdir = run, workdir
        self.config = config = run.config
        self.checkpoints, self.metrics, self.online, self.profiler = checkpoints, metrics, online, profiler
        self.encoder, self.watchdog, self.stop = encoder, watchdog, stop
        self.health = Health(
            config,
            workdir,
            read_batch=lambda step: whole_batch(config, online, step),
            null=lambda: self.null,
            newest_checkpoint=checkpoints.latest_step,
            say=metrics.say,
            long_work=watchdog.long_work,
        )
        self.null = null_text(config, online)
        self.placed_null = put_whole(self.null, run.mesh)
        self._grid: SampleGrid | None = None
        self._held_out: HeldOutLoss | None = None
        self._said_cut = False
        self._best: float | None = None  # newest value of the metric by which the best checkpoints are kept

    def run(
        self, state: TrainState, step: int, train_step: Any, batches: Batches | TokenizedBatches
    ) -> TrainState:
        """Steps from `step` + 1 to the last, or until stopped; the last state is saved."""
        loop, start = self.config.train, step
        # The next batch is put on the devices while they work on this one.
        batch = self._next(step + 1, batches)
        if step < loop.steps:
            train_step = self._compiled(train_step, step, state, batch)
        while step < loop.steps:
            # The first step may wait for what the devices still have to do.
            self.watchdog.at(step + 1, Phase.STEP if step > start else Phase.LONG)
            self.profiler.before(step + 1, state)
            with self.metrics.clock.step():
                state, values = train_step(state, batch, self.placed_null)
            step += 1
            stopping = self.stop is not None and self.stop(step)
            last = step == loop.steps or stopping
            if not last:
                batch = self._next(step + 1, batches)
            self._check(step, state, values)
            self.profiler.after(step, state)
            self.metrics.advance()
            seen = self._look(step, state, last) if not stopping else {}
            if step % loop.log_every == 0 or last or seen:
                self.watchdog.at(step + 1, Phase.LOG)
                self._log(step, values, state, seen | {"enlarged": batches.count.enlarged_share})
                if warning := batches.count.warning():
                    self.metrics.say(warning)
                self._say_cut(batches.texts)
            if step % loop.checkpoint_every == 0 or last:
                self._save(step, state)
            if stopping:
                break
        with self.watchdog.long_work(step):
            self.checkpoints.wait()
        return state

    def _compiled(self, train_step: Any, step: int, state: TrainState, batch: dict[str, jax.Array]) -> Any:
        """The training step as a program. The time is no part of training."""
        name, first = self.config.stage.name, jax.process_index() == 0
        with (
            self.metrics.pause(),
            self.watchdog.long_work(step),
            elapsed(f"compiling the training step of {name}", enabled=first),
        ):
            made = train_step.lower(state, batch, self.placed_null).compile()
            # Processes of CPUs wait 30 s for each other in their first collective: less than their compilations
            # may differ on a busy machine.
            if jax.process_count() > 1:
                gather("compiled")
        return made

    def _next(self, step: int, batches: Iterator[Any]) -> dict[str, jax.Array]:
        """The batch of a step, on its way to the devices."""
        self.watchdog.at(step, Phase.DATA)
        with self.metrics.clock.data():
            batch = next(batches)
        return device_batch(batch, self.of.mesh, self.online)

    def _check(self, step: int, state: TrainState, values: Mapping[str, jax.Array] | None = None) -> None:
        """Looks whether steps were finite: with `values` at one some steps before, without at all up to this one."""
        self.watchdog.at(step + 1, Phase.STEP)
        with self.metrics.clock.step():
            if values is None:
                self.health.drain(state)
            else:
                self.health.note(step, dict(values), state)

    def _log(
        self, step: int, values: Mapping[str, jax.Array], state: TrainState, seen: dict[str, float]
    ) -> None:
        self._check(step, state)
        scalars, of_roles = ("loss", "grad_norm", "learning_rate", "skipped"), ("loss/", "grad_norm/")
        named = [name for name in values if name in scalars or name.startswith(of_roles)]
        numbers = {name: values[name].item() for name in named}
        numbers |= self.health.take_bins() | seen
        self._best = numbers.get(self.config.train.best_metric, self._best)
        self.metrics.log(step, numbers)
        self.checkpoints.check()

    def _say_cut(self, texts: TextCount) -> None:
        """Says once, when there are some, how many captions the stage does not see the end of."""
        if texts.cut and not self._said_cut:
            self._said_cut = True
            length = self.config.stage.max_text_length
            self.metrics.say(f"{texts} so far are cut: config.stage.max_text_length={length} tokens")

    def _save(self, step: int, state: TrainState) -> None:
        """Begins to save; waits for the save before this one, if it is still going on."""
        self._check(step, state)
        examples = step * self.config.data.batch_size
        with self.watchdog.long_work(step):
            self.checkpoints.save(
                step, state, examples=examples, config=self.config, metric=self._best, encoder=self.encoder
            )

    def _look(self, step: int, state: TrainState, last: bool) -> dict[str, float]:
        """Held-out loss and sample grid where they are due; their figures. The time is no part of training."""
        loop, seen = self.config.train, {}
        evaluate = bool(loop.eval_every) and (step % loop.eval_every == 0 or last)
        draw = bool(loop.sample_every) and (step % loop.sample_every == 0 or last)
        if not evaluate and not draw:
            return {}
        self._check(step, state)
        with self.metrics.pause(), self.watchdog.long_work(step):
            if evaluate:
                self._held_out = self._held_out or self._make_held_out()
                seen = self._held_out(state, self.placed_null)
            if draw:
                try:
                    self._grid = self._grid or SampleGrid(
                        self.of,
                        self.workdir,
                        sample_inputs(self.config, self.online, self.encoder),
                        self.null,
                    )
                    pictures, scores = self._grid.draw(state)
                except (
                    UserError
                ) as error:  # no reason to stop: weights and losses are looked at for themselves
                    self.metrics.say(f"step {step}: no sample grid: {error}")
                else:
                    self.metrics.pictures(step, pictures)
                    seen |= scores
        return seen

    def _make_held_out(self) -> HeldOutLoss:
        share = data_share(self.of.mesh)
        return HeldOutLoss(
            self.of,
            pipeline_config(self.config),
            lambda pipeline: training_batches(self.config, self.online, 0, share, pipeline),
            lambda batch: device_batch(batch, self.of.mesh, self.online),
        )
