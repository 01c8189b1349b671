"""`imagen-jax sample`: from prompts to PNG files and a grid."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_jax.errors import UserError

if TYPE_CHECKING:
    from imagen_jax.models.stage import SamplingConfig, StageConfig

EXAMPLE = """example:
  imagen-jax sample "a small red circle on a blue background" --model=model --out=pictures --num_images=4

Writes one PNG a picture (prompt and seed in its metadata) and grid.png. Image j of each prompt has seed
SEED + j and depends on its prompt and that seed only. --steps, --guidance and --sampler take one value for
all stages or one a stage, separated by commas."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="captions of the pictures to make")
    parser.add_argument("--model", required=True, help="model folder (`imagen-jax export`)")
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--prompts_file", help="text file with one prompt a line")
    parser.add_argument("--num_images", type=int, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first picture of each prompt (default 0)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument(
        "--steps",
        help="network steps, of one network call each (heun: two, and one in the last: 2*STEPS-1 in all); "
        "default: the stage's own",
    )
    parser.add_argument("--guidance", help="guidance weight, 1 is off; default: the stage's own")
    parser.add_argument("--sampler", help="ddpm, ddim, dpmpp, dpmpp_sde or heun; default: the stage's own")
    parser.add_argument(
        "--negative_prompt", help="what guidance leads away from, in every guided stage; default: nothing"
    )


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """The prompts of the command line followed by those of the file.

    Raises:
      UserError: if there are none, or the file cannot be read.
    """
    prompts = list(prompts)
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"--prompts_file {file}: there is no such file")
        prompts += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError('give a prompt, as in imagen-jax sample "a red circle" …, or --prompts_file')
    return prompts


def _per_stage(flag: str, text: str | None, kind: type, stages: int) -> list:
    """One value a stage from "a" or "a,b,…"; None for stages' own."""
    if text is None:
        return [None] * stages
    parts = text.split(",")
    if len(parts) not in (1, stages):
        raise UserError(f"--{flag} {text}: give one value, or one for each of the {stages} stages")
    try:
        values = [kind(part) for part in parts]
    except ValueError:
        raise UserError(f"--{flag} {text}: not a {kind.__name__}") from None
    return values * stages if len(values) == 1 else values


def sampling_overrides(
    args: argparse.Namespace, stages: "tuple[StageConfig, ...]"
) -> "dict[str, SamplingConfig]":
    """How to sample each stage, by its name, from --steps, --guidance and --sampler."""
    from imagen_jax.sampling.stage_sampler import override_sampling

    count = len(stages)
    steps = _per_stage("steps", args.steps, int, count)
    guidance = _per_stage("guidance", args.guidance, float, count)
    samplers = _per_stage("sampler", args.sampler, str, count)
    try:
        return {
            stage.name: override_sampling(
                stage.sampling, steps=steps[i], guidance_weight=guidance[i], sampler=samplers[i]
            )
            for i, stage in enumerate(stages)
        }
    except ValueError as error:
        raise UserError(f"--steps, --guidance or --sampler: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Samples and writes the pictures."""
    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.pictures import grid, save_png

    prompts = read_prompts(args.prompts, args.prompts_file)
    model = Imagen.load(args.model)
    made = model.pictures(
        prompts,
        seed=args.seed,
        num_images=args.num_images,
        batch_size=args.batch_size,
        negative_prompt=args.negative_prompt,
        sampling=sampling_overrides(args, model.stages),
        progress=True,
    )
    negative = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(made):
        name = f"{i // args.num_images:05d}-{picture.seed}.png"
        metadata = {"prompt": picture.prompt, **negative, "seed": picture.seed, "model": args.model}
        save_png(out / name, picture.pixels, metadata)
    columns = args.num_images if args.num_images > 1 else None
    save_png(out / "grid.png", grid([picture.pixels for picture in made], columns=columns))
    print(f"{len(made)} pictures in {out}, all together in {out / 'grid.png'}")
    return 0
