"""`imagen-jax quickstart`: the whole way on embedded data."""

import argparse

EXAMPLE = """example:
  imagen-jax quickstart --out=runs/quickstart

Needs no download and no accelerator. Ends with OUT/grid.png, OUT/scores.json and OUT/model. An interrupted
run is continued by the same command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("--out", default="runs/quickstart", help="folder to write (default %(default)s)")
    parser.add_argument(
        "--scale", default="full", help='"full", or "smoke" to see in a few minutes that everything runs'
    )


def run(args: argparse.Namespace) -> int:
    """Runs the quickstart."""
    from imagen_jax.parallel.mesh import use_cpu_devices
    from imagen_jax.quickstart import quickstart

    use_cpu_devices()
    quickstart(args.out, scale=args.scale)
    return 0
