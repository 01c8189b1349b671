"""`imagen-jax train`: train one stage, or go on training it."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.errors import UserError

if TYPE_CHECKING:
    from imagen_jax.parallel.processes import ProcessConfig, StopRequest
    from imagen_jax.parallel.watchdog import Watchdog
    from imagen_jax.training.clock import ProfileSteps
    from imagen_jax.training.config import TrainConfig
    from imagen_jax.training.metrics import StepCost
    from imagen_jax.training.state import TrainState

EXAMPLE = """example:
  imagen-jax train --config=shapes/base16.py --workdir=runs/base --config.data.path=records
  imagen-jax train --config=shapes/base16.py:smoke --workdir=runs/smoke --config.data.path=records \\
      --config.optimizer.learning_rate=3e-4 --config.train.accumulate=2
  imagen-jax train --help_config

  imagen-jax train --config=imagen/base64.py --workdir=gs://bucket/base --distributed

The same command goes on after an interruption. SIGTERM saves a checkpoint and ends it with exit code 75. In a job
of several processes (the last example, started on every host; see launch/) all end as soon as one of them is gone
or stops stepping; exit code 75 says that the run is not finished and the command may simply be started again."""


class _HelpConfig(argparse.Action):
    """Prints the fields of a config, as --help prints the flags."""

    def __init__(self, option_strings: Sequence[str], dest: str, **rest: Any):
        super().__init__(option_strings, dest, nargs=0, **rest)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from imagen_jax.config_help import describe
        from imagen_jax.training.config import TrainConfig

        print(describe(TrainConfig))
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.set_defaults(usage_error=parser.error)
    parser.usage = "%(prog)s --config=FILE[:variant] --workdir=DIR [--config.some.field=value ...]"
    parser.add_argument(
        "--config",
        help="config file, or its path below the installed configs/, and its variant",
    )
    parser.add_argument("--workdir", help="folder for checkpoints, metrics and samples")
    parser.add_argument(
        "--help_config", action=_HelpConfig, help="print every field of a config, its default and its meaning"
    )
    parser.add_argument(
        "--init_from",
        metavar="DIR[@DECAY]",
        help="start from the averaged weights of a work directory (@DECAY: of that average, @0: of none) or of a "
        "model folder, or demo, the model in the package",
    )
    parser.add_argument(
        "--profile_steps", metavar="FIRST:LAST", help="write a trace of these steps to WORKDIR/profile"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases as well")
    parser.add_argument(
        "--reproduce",
        metavar="DIR",
        help="run the step of a folder WORKDIR/nonfinite/STEP again and say what is not finite; no other flag needed",
    )
    parser.add_argument(
        "--cpu_devices",
        type=int,
        default=1,
        help="devices to make of the CPU's cores; no effect on accelerators",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, which TPU pods, GKE, Slurm and MPI make known by themselves",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, where nothing makes the processes known"
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="with --coordinator")
    parser.add_argument("--process_id", type=int, metavar="I", help="with --coordinator: from 0 to N-1")
    parser.add_argument(
        "--peer_timeout",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="without a sign of life of a process, after which the others end (%(default)s)",
    )


def run_with_overrides(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains; `overrides` are the arguments --config.some.field=value."""
    if args.reproduce is None and None in (args.config, args.workdir):
        args.usage_error("the arguments --config and --workdir are required")
    from imagen_jax.parallel.mesh import use_cpu_devices

    if args.reproduce is not None:
        use_cpu_devices(args.cpu_devices)
        from imagen_jax.training.health import reproduce

        print(reproduce(args.reproduce))
        return 0
    from imagen_jax.parallel.processes import EXIT_RESTART, ProcessConfig, StopRequest
    from imagen_jax.training.clock import ProfileSteps
    from imagen_jax.training.config import load_config

    # First of all: a SIGTERM during the imports and the start is not lost.
    with contextlib.closing(StopRequest()) as stop:
        processes = ProcessConfig(
            distributed=args.distributed,
            coordinator=args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
            peer_timeout=args.peer_timeout,
        )
        profile = None if args.profile_steps is None else ProfileSteps.parse(args.profile_steps)
        config = load_config(args.config, overrides)
        use_cpu_devices(args.cpu_devices)
        state = _train(args, config, processes, stop, profile)
    if int(state.step) < config.train.steps:
        print(f"stopped and saved at step {int(state.step)}: {args.workdir}; the same command goes on")
        return EXIT_RESTART
    print(f"trained: {args.workdir}")
    return 0


def _train(
    args: argparse.Namespace,
    config: "TrainConfig",
    processes: "ProcessConfig",
    stop: "StopRequest",
    profile: "ProfileSteps | None",
) -> "TrainState":
    """Trains, as one of the job's processes, watched."""
    from imagen_jax.parallel.processes import EXIT_RESTART, start_processes, stop_processes
    from imagen_jax.parallel.watchdog import Watchdog
    from imagen_jax.training.trainer import train

    try:
        start_processes(processes)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        print(f"imagen-jax train: error: no connection to the other processes: {reason}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_RESTART)  # a tidy end would wait for them
    stop.share()
    watchdog = Watchdog(step_timeout=config.train.watchdog_seconds, peer_timeout=processes.peer_timeout)
    watchdog.start()

    def work() -> "TrainState":
        return train(
            config,
            args.workdir,
            watchdog=watchdog,
            stop=stop.reached,
            init_from=args.init_from,
            profile=profile,
            wandb_project=args.wandb,
            cost=_step_cost(config),
        )

    state = _together(watchdog, work, args.debug)
    watchdog.close()
    stop_processes()
    return state


def _step_cost(config: "TrainConfig") -> "StepCost | None":
    """What the model's share of the devices' peak is reckoned from; None on devices whose peak is not known."""
    import jax

    from imagen_jax.models.stage import StageNetwork
    from imagen_jax.plan.chips import device_peak_flops
    from imagen_jax.plan.flops import forward_flops
    from imagen_jax.training.metrics import StepCost

    peak = device_peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    stage = config.stage
    # The backward pass has two products for each of the forward's; what is computed again does not count.
    flops = 3 * forward_flops(StageNetwork(stage), size=config.step_size)
    return StepCost(flops=float(flops), peak_flops=peak)


def _together(watchdog: "Watchdog", work: "Callable[[], TrainState]", debug: bool) -> "TrainState":
    """Does the work; of several processes, all end when one fails, and none waits for it."""
    import jax

    from imagen_jax.parallel.processes import EXIT_RESTART

    try:
        return work()
    except BaseException as error:
        if jax.process_count() == 1:
            watchdog.close()
            raise
        expected = isinstance(error, (UserError, OSError))
        if not expected:
            # A collective fails at once where another process has died: the watchdog knows which.
            watchdog.await_verdict()
        if debug or not expected:
            traceback.print_exc()
        print(f"imagen-jax train: error: {error}", file=sys.stderr)
        watchdog.give_up(str(error), 1 if expected else EXIT_RESTART)
        raise
