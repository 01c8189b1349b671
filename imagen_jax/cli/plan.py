"""`imagen-jax plan`: what a stage needs on a TPU slice that is not here."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

EXAMPLE = """example:
  imagen-jax plan --config=imagen/sr256.py --topology=v5e:16x16 --json=plan.json
  imagen-jax plan --config=imagen/base64.py --topology=v4:8x8x4 --program=sample --batch_size=256
  imagen-jax plan --config=imagen/base64.py --topology=v5p:4x4x8 --config.mesh.fsdp=32

Compiles the stage's program with the TPU compiler (pip install libtpu; no TPU is needed) and prints what each chip
keeps in memory, how long a step is predicted to take and where the time goes. Slices are chips along each axis:
v4:2x2x1 and v5p:2x2x1 upwards, v5e:1x1 and v6e:1x1 to 16x16."""


_MOST_KIB = 2**17  # no chip has more on-chip memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.usage = (
        "%(prog)s --config=FILE[:variant] --topology=CHIP:SHAPE [--program=train|sample] [--batch_size=N]\n"
        "       [--rows=N] [--size=WxH] [--operation_kib=N] [--json=FILE] [--config.some.field=value ...]"
    )
    parser.add_argument(
        "--config",
        required=True,
        help="config file, or its path below the installed configs/, and its variant",
    )
    parser.add_argument("--topology", required=True, help="slice of v4, v5e, v5p or v6e chips, as v5e:16x16")
    parser.add_argument(
        "--program", choices=["train", "sample"], default="train", help="what is planned (default train)"
    )
    parser.add_argument(
        "--batch_size", type=int, help="pictures over all chips; default: the config's data.batch_size"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=1,
        help="with --program=sample: devices over which the rows of a picture are split, of the mesh's data (1)",
    )
    parser.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="of the stage's pictures; default: the config's data.size"
    )
    parser.add_argument(
        "--operation_kib",
        type=int,
        metavar="N",
        help="with --program=train: on-chip memory of one operation. Less than libtpu's own choice compiles faster, "
        "8192 in 60 %% of the time, to a program that is a few percent slower than what train will run",
    )
    parser.add_argument("--json", metavar="FILE", help="also writes the numbers here")


def run_with_overrides(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Plans; `overrides` are the arguments --config.some.field=value."""
    from imagen_jax.errors import UserError
    from imagen_jax.limits import MAX_BATCH, shown
    from imagen_jax.plan.chips import parse_topology
    from imagen_jax.plan.environment import find_compiler

    topology = parse_topology(args.topology)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}: must be at least 1")
    if args.batch_size is not None and args.batch_size > MAX_BATCH:
        raise UserError(f"--batch_size={shown(args.batch_size)}: must be at most {MAX_BATCH}")
    if args.operation_kib is not None and args.program != "train":
        raise UserError(f"--operation_kib={shown(args.operation_kib)}: is for --program=train")
    if args.operation_kib is not None and not 1 <= args.operation_kib <= _MOST_KIB:
        raise UserError(f"--operation_kib={shown(args.operation_kib)}: must be from 1 to {_MOST_KIB}")
    from etils import epath

    if args.json is not None and (
        epath.Path(args.json).is_dir() or not epath.Path(args.json).parent.is_dir()
    ):
        # Before minutes of compiling.
        raise UserError(f"--json {args.json}: no file can be written there")
    find_compiler()
    from imagen_jax.files import write_text
    from imagen_jax.plan.compile import Program
    from imagen_jax.plan.report import make_plan, to_json, to_text
    from imagen_jax.sizes import parse_size
    from imagen_jax.training.config import load_config

    config = load_config(args.config, overrides)
    if args.batch_size is not None:
        data = dataclasses.replace(config.data, batch_size=args.batch_size)
        config = dataclasses.replace(config, data=data)
    if args.size is not None:
        size = parse_size(args.size, "--size")
        try:
            data = dataclasses.replace(config.data, size=(size.width, size.height))
            config = dataclasses.replace(config, data=data)
        except ValueError as error:
            raise UserError(f"--size {args.size}: {error}") from error
    plan = make_plan(
        config,
        topology,
        Program(args.program),
        rows=args.rows,
        operation_kib=args.operation_kib,
        progress=True,
    )
    print(to_text(plan))
    if args.json is not None:
        write_text(args.json, json.dumps(to_json(plan), indent=2) + "\n")
    return 0
