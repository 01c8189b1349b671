"""`imagen-jax train`: train one stage, or go on training it."""

import argparse
from collections.abc import Sequence
from typing import Any

EXAMPLE = """example:
  imagen-jax train --config=shapes/base16.py --workdir=runs/base --config.data.path=records
  imagen-jax train --config=shapes/base16.py:smoke --workdir=runs/smoke --config.data.path=records \\
      --config.optimizer.learning_rate=3e-4 --config.train.accumulate=2
  imagen-jax train --help_config

The same command goes on after an interruption."""


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
        "model folder",
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


def run_with_overrides(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains; `overrides` are the arguments --config.some.field=value."""
    if args.reproduce is None and None in (args.config, args.workdir):
        args.usage_error("the arguments --config and --workdir are required")
    from imagen_jax.parallel.mesh import use_cpu_devices

    use_cpu_devices(args.cpu_devices)
    if args.reproduce is not None:
        from imagen_jax.training.health import reproduce

        print(reproduce(args.reproduce))
        return 0
    from imagen_jax.training.clock import ProfileSteps
    from imagen_jax.training.config import load_config
    from imagen_jax.training.trainer import train

    train(
        load_config(args.config, overrides),
        args.workdir,
        init_from=args.init_from,
        profile=None if args.profile_steps is None else ProfileSteps.parse(args.profile_steps),
        wandb_project=args.wandb,
    )
    print(f"trained: {args.workdir}")
    return 0
