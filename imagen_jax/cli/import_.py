"""`imagen-jax import`: published weights of others into a model folder."""

import argparse

EXAMPLE = """example:
  imagen-jax import deepfloyd --stage1=IF-I-XL-v1.0 --stage2=IF-II-L-v1.0 --out=model
  imagen-jax sample "a red circle" --model=model --out=pictures --timesteps=smart50

A stage is a local folder in diffusers' format or a hub id such as DeepFloyd/IF-I-XL-v1.0, whose licence has to be
accepted first. Nothing that a file of weights says is run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("kind", choices=["deepfloyd"], help="whose weights: deepfloyd (DeepFloyd IF)")
    parser.add_argument("--stage1", required=True, help="folder or hub id of stage I, 64×64")
    parser.add_argument("--stage2", help="folder or hub id of stage II, to 256×256; default: stage I alone")
    parser.add_argument(
        "--text_encoder",
        help="folder or hub id of the T5 encoder; default: the text_encoder folder of stage I",
    )
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument(
        "--dtype", default="float32", help="of weights and computation: float32 (default) or bfloat16"
    )
    parser.add_argument("--variant", help="fp16 for files that are called *.fp16.safetensors")
    parser.add_argument(
        "--reference_text_encoder",
        action="store_true",
        help="refer to the text encoder instead of copying it into the model folder",
    )


def run(args: argparse.Namespace) -> int:
    """Imports."""
    from imagen_jax.convert.deepfloyd.importing import ImportConfig, import_deepfloyd
    from imagen_jax.errors import UserError

    try:
        config = ImportConfig(
            stage1=args.stage1,
            stage2=args.stage2,
            text_encoder=args.text_encoder,
            out=args.out,
            dtype=args.dtype,
            variant=args.variant,
            copy_text_encoder=not args.reference_text_encoder,
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error
    stages = import_deepfloyd(config)
    print(
        f"{args.out}: " + " → ".join(f"{each.name} ({each.resolution}×{each.resolution})" for each in stages)
    )
    return 0
