"""`imagen-jax export`: from work directories to a model folder."""

import argparse

EXAMPLE = """example:
  imagen-jax export --from=runs/base,runs/sr --out=model
  imagen-jax export --from=model --format=diffusers --out=pipelines"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--from", dest="workdirs", required=True, help="work directories of the stages, separated by commas"
    )
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument(
        "--format",
        default="imagen_jax",
        choices=["imagen_jax", "diffusers"],
        help="diffusers: a pipeline folder OUT/STAGE for each DeepFloyd stage; --from may be a model folder",
    )
    parser.add_argument(
        "--text_encoder", help="folder or hub id; default: the encoder that made the base stage's records"
    )
    parser.add_argument(
        "--reference_text_encoder",
        action="store_true",
        help="refer to the text encoder instead of copying its weights into the model folder",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "int8"],
        help="of the stages' weights in the model folder; int8 has a scale a channel; default: as they were "
        "trained. Drawing is not changed by it, but for the weights' rounding",
    )
    parser.add_argument(
        "--ema_decay",
        type=float,
        help="which average of the weights: a decay of config.train.ema_decays, or 0 for the weights as they are; "
        "default: config.train.ema_decay",
    )


def run(args: argparse.Namespace) -> int:
    """Exports."""
    from imagen_jax.errors import UserError
    from imagen_jax.training.export import export, export_pipelines

    if args.format == "diffusers":
        if args.dtype is not None:
            raise UserError(f"--dtype={args.dtype}: is for --format=imagen_jax")
        names = export_pipelines(
            [workdir for workdir in args.workdirs.split(",") if workdir],
            args.out,
            text_encoder=args.text_encoder,
            ema_decay=args.ema_decay,
        )
        print("\n".join(f"{args.out}/{name}" for name in names))
        return 0
    stages = export(
        [workdir for workdir in args.workdirs.split(",") if workdir],
        args.out,
        text_encoder=args.text_encoder,
        copy_text_encoder=not args.reference_text_encoder,
        ema_decay=args.ema_decay,
        dtype=args.dtype,
    )
    print(
        f"{args.out}: "
        + " → ".join(f"{stage.name} ({stage.resolution}×{stage.resolution})" for stage in stages)
    )
    return 0
