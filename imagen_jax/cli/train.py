"""`imagen-jax train`: train one stage, or go on training it."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from imagen_jax.errors import UserError

if TYPE_CHECKING:
    from imagen_jax.parallel.watchdog import Watchdog
    from imagen_jax.training.state import TrainState

EXAMPLE = """example:
  imagen-jax train --config=shapes/base16.py --workdir=runs/base --config.data.path=records
  imagen-jax train --config=imagen/base64.py:debug --workdir=runs/debug --config.data.path=records \\
      --config.optimizer.learning_rate=3e-4

  imagen-jax train --config=imagen/base64.py --workdir=gs://bucket/base --distributed

The same command goes on after an interruption. SIGTERM saves a checkpoint and ends it with exit code 0. In a job
of several processes (the last example, started on every host; see launch/) all end as soon as one of them is gone
or stops stepping; exit code 75 says that the command may simply be started again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.usage = "%(prog)s --config=FILE[:variant] --workdir=DIR [--config.some.field=value ...]"
    parser.add_argument(
        "--config",
        required=True,
        help="config file, or its path below the installed configs/, and its variant",
    )
    parser.add_argument("--workdir", required=True, help="folder for checkpoints, metrics and samples")
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
    from imagen_jax.parallel.mesh import use_cpu_devices
    from imagen_jax.parallel.processes import ProcessConfig, StopRequest, start_processes, stop_processes
    from imagen_jax.parallel.watchdog import Watchdog
    from imagen_jax.training.config import load_config
    from imagen_jax.training.trainer import train

    stop = StopRequest()
    processes = ProcessConfig(
        distributed=args.distributed,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        peer_timeout=args.peer_timeout,
    )
    config = load_config(args.config, overrides)
    use_cpu_devices(args.cpu_devices)
    start_processes(processes)
    stop.share()
    watchdog = Watchdog(step_timeout=config.train.watchdog_seconds, peer_timeout=processes.peer_timeout)
    watchdog.start()
    state = _together(
        watchdog, lambda: train(config, args.workdir, watchdog=watchdog, stop=stop.reached), args.debug
    )
    watchdog.close()
    stop_processes()
    if int(state.step) < config.train.steps:
        print(f"stopped and saved at step {int(state.step)}: {args.workdir}; the same command goes on")
    else:
        print(f"trained: {args.workdir}")
    return 0


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
