"""`imagen-jax train`: train one stage, or go on training it."""

import argparse
from collections.abc import Sequence

EXAMPLE = """example:
  imagen-jax train --config=shapes/base16.py --workdir=runs/base --config.data.path=records
  imagen-jax train --config=imagen/base64.py:debug --workdir=runs/debug --config.data.path=records \\
      --config.optimizer.learning_rate=3e-4

The same command goes on after an interruption."""


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


def run_with_overrides(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains; `overrides` are the arguments --config.some.field=value."""
    from imagen_jax.parallel.mesh import use_cpu_devices
    from imagen_jax.training.config import load_config
    from imagen_jax.training.trainer import train

    use_cpu_devices(args.cpu_devices)
    train(load_config(args.config, overrides), args.workdir)
    print(f"trained: {args.workdir}")
    return 0
