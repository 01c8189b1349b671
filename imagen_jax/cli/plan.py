"""`imagen-jax plan`: what a stage needs on a TPU slice that is not here."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagen_jax.training.config import TrainConfig

EXAMPLE = """example:
  imagen-jax plan --config=imagen/sr256.py --topology=v5e:16x16 --json=plan.json
  imagen-jax plan --config=imagen/base64.py --topology=v4:8x8x4 --program=sample --batch_size=256
  imagen-jax plan --config=imagen/base64.py --topology=v5p:4x4x8 --config.mesh.fsdp=32
  imagen-jax plan --program=sample --config=imagen/base64.py --config=imagen/sr256.py --topology=v5e:2x4 \\
      --batch_size=8 --steps=32 --config.mesh.fsdp=1 --config.mesh.data=-1
  imagen-jax plan --config=pictures/base32.py --device=rtx4090

Compiles the stage's program with the TPU compiler (pip install libtpu; no TPU is needed) and prints what each chip
keeps in memory, how long a step is predicted to take and where the time goes. Slices are chips along each axis:
v4:2x2x1 and v5p:2x2x1 upwards, v5e:1x1 and v6e:1x1 to 16x16."""


_MOST_KIB = 2**17  # no chip has more on-chip memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.usage = (
        "%(prog)s --config=FILE[:variant] [--config=FILE ...] | --model=MODEL  --topology=CHIP:SHAPE [--slices=N] |\n"
        "       --device=GPU [--program=train|sample] [--batch_size=N] [--rows=N] [--size=WxH] [--steps=N]\n"
        "       [--operation_kib=N] [--json=FILE] [--config.some.field=value ...]"
    )
    parser.add_argument(
        "--config",
        action="append",
        help="config file, or its path below the installed configs/, and its variant; with --program=sample once for "
        "every stage of a cascade, base first",
    )
    parser.add_argument(
        "--model", help="with --program=sample: model folder (or demo), all of whose stages are planned"
    )
    parser.add_argument("--topology", help="slice of v4, v5e, v5p or v6e chips, as v5e:16x16")
    parser.add_argument("--slices", type=int, default=1, help="number of such slices (1)")
    parser.add_argument(
        "--device", metavar="GPU", help="instead: one h100, h200, a100, l4, t4 or rtx4090, by formula"
    )
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
        "--size",
        metavar="WIDTHxHEIGHT",
        help="of the pictures, of a cascade the last stage's; default: the config's data.size, or the model's own",
    )
    parser.add_argument(
        "--steps",
        metavar="N[,N…]",
        help="with --program=sample: sampling steps of all stages, or of every one",
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
    _check(args)
    if args.topology is not None:
        from imagen_jax.plan.chips import parse_topology
        from imagen_jax.plan.environment import find_compiler

        topology = parse_topology(args.topology, args.slices)
        find_compiler()
    configs = _configs(args, overrides)
    from imagen_jax.files import write_text
    from imagen_jax.plan.compile import Program

    program = Program(args.program)
    if args.device is not None:
        from imagen_jax.plan.gpus import make_gpu_plan, parse_device

        gpu = parse_device(args.device)
        plans = [make_gpu_plan(config, gpu, program) for config in configs]
        text = "\n\n".join(plan.to_text() for plan in plans)
        numbers: object = [plan.to_json() for plan in plans] if len(plans) > 1 else plans[0].to_json()
    elif args.model is not None or len(configs) > 1:
        from imagen_jax.plan.cascade import make_cascade_plan

        cascade = make_cascade_plan(configs, topology, rows=args.rows, progress=True)
        text, numbers = cascade.to_text(), cascade.to_json()
    else:
        from imagen_jax.plan.report import make_plan, to_json, to_text

        plan = make_plan(
            configs[0],
            topology,
            program,
            rows=args.rows,
            operation_kib=args.operation_kib,
            progress=True,
        )
        text, numbers = to_text(plan), to_json(plan)
    print(text)
    if args.json is not None:
        write_text(args.json, json.dumps(numbers, indent=2) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that mean nothing, before anything is read."""
    from imagen_jax.errors import UserError
    from imagen_jax.limits import MAX_BATCH, shown

    if (args.topology is None) == (args.device is None):
        raise UserError("give --topology, a slice of TPUs, or --device, a GPU")
    if (args.config is None) == (args.model is None):
        raise UserError("give --config, once for every stage, or --model")
    if args.program != "sample":
        for flag, given in (
            ("--model", args.model is not None),
            ("--config", len(args.config or ()) > 1),
            ("--steps", args.steps is not None),
        ):
            if given:
                what = "given more than once" if flag == "--config" else "given"
                raise UserError(f"{flag}: {what}, which is for --program=sample")
    if args.device is not None and args.slices != 1:
        raise UserError(f"--slices={shown(args.slices)}: is for --topology")
    if args.device is not None and args.rows != 1:
        raise UserError(f"--rows={shown(args.rows)}: a GPU of --device has whole pictures")
    if args.device is not None and args.operation_kib is not None:
        raise UserError(f"--operation_kib={shown(args.operation_kib)}: is for --topology")
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


def _configs(args: argparse.Namespace, overrides: Sequence[str]) -> "list[TrainConfig]":
    """What is planned, with the flags applied."""
    from imagen_jax.errors import UserError
    from imagen_jax.plan.cascade import in_order, model_configs
    from imagen_jax.sampling.overrides import override_all, parse_overrides
    from imagen_jax.sizes import parse_size
    from imagen_jax.training.config import load_config

    if args.batch_size is not None:
        overrides = [*overrides, f"--config.data.batch_size={args.batch_size}"]
    if args.model is not None:
        configs = model_configs(args.model, overrides)
    else:
        configs = [load_config(spec, overrides) for spec in args.config]
    size = None if args.size is None else parse_size(args.size, "--size")
    if args.steps is not None:
        own = [config.stage.sampling for config in configs]
        sampling = override_all(own, parse_overrides({"steps": args.steps}, len(configs)))
        configs = [
            dataclasses.replace(config, stage=dataclasses.replace(config.stage, sampling=chosen))
            for config, chosen in zip(configs, sampling)
        ]
    if args.model is not None or len(configs) > 1:
        return in_order(configs, size)
    if size is None:
        return configs
    try:
        data = dataclasses.replace(configs[0].data, size=(size.width, size.height))
        return [dataclasses.replace(configs[0], data=data)]
    except ValueError as error:
        raise UserError(f"--size {args.size}: {error}") from error
