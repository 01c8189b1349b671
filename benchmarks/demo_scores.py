"""What the model in the box draws rightly, of captions whose pairs of colour and shape it never saw; its acceptance.

python benchmarks/demo_scores.py --model=demo --out=DIR
python benchmarks/demo_scores.py --model=demo --out=DIR --steps=8
python benchmarks/demo_scores.py --model=demo --out=DIR --until=32

Draws `--count` captions of a kind, number i with seed i, and has the oracle read the pictures: one object, a striped or
hollow one, two objects, two to four equal ones, and one and two objects in Chinese. DIR/<kind>.png shows the first
of them. Then the places of one object at guidance weight 1, against those of the data. DIR/scores.json keeps each
kind when it is done; an interrupted run goes on. Exit code 1 says that a score is below its bar.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from imagen_jax.data.shapes import Scene, Texture
from imagen_jax.data.shapes_render import render
from imagen_jax.data.shapes_world import Jitter, Kind, world_scene
from imagen_jax.evaluation import oracle
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices
from imagen_jax.sampling.cascade import Imagen, Picture
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.overrides import SamplingOverrides
from imagen_jax.sampling.pictures import grid, save_png

BARS = {
    "one": {"background": 0.99, "colour": 0.99, "size": 0.98, "shape": 0.95},
    "textured": {"texture": 0.85},
    "two": {"colour": 0.92, "shape": 0.80, "relation": 0.90},
    "equal": {"count": 0.80},
}
LOSS_OF_FEW_STEPS = 0.03  # below a bar, with --steps
LOSS_OF_CHINESE = 0.02  # below the English score
SPREAD = (0.8, 1.25)  # of centres, over the data's
RADIUS = (0.95, 1.05)
CHUNK = 64
SHOWN = 64


def scenes(kind: str, count: int) -> list[Scene]:
    """The first held-out scenes of a kind."""
    world = {"two": Kind.PAIR, "equal": Kind.EQUAL}.get(kind, Kind.LONE)
    held_out = (world_scene(i, split="test", kind=world, jitter=Jitter.WIDE) for i in range(10**9))
    if kind == "textured":
        held_out = (scene for scene in held_out if scene.objects[0].texture is not Texture.SOLID)
    return [scene for scene, _ in zip(held_out, range(count))]


class Painter:
    """Draws captions with a model's settings and some overrides."""

    def __init__(self, model: Imagen, overrides: SamplingOverrides, until: int | None):
        self.model, self.until = model, until
        self.sampling = {stage.name: overrides.apply(stage.sampling) for stage in model.stages}

    def __call__(self, captions: list[str]) -> list[Picture]:
        """A picture a caption, number i with seed i."""
        wanted = tuple((caption, i) for i, caption in enumerate(captions))
        drawing = Drawing(wanted=wanted, sampling=self.sampling, until=self.until)
        return list(self.model.draw(drawing, batch_size=CHUNK, progress=True))


def scores_of(painter: Painter, kind: str, count: int, out: Path) -> dict[str, float]:
    """What the oracle says of the pictures of a kind, "…_zh" for its Chinese captions."""
    wanted = scenes(kind.removesuffix("_zh"), count)
    captions = [scene.caption_zh if kind.endswith("_zh") else scene.caption for scene in wanted]
    pictures = painter(captions)
    save_png(out / f"{kind}.png", grid([picture.pixels for picture in pictures[:SHOWN]], columns=8))
    return oracle.score([picture.pixels for picture in pictures], captions)


def places(pictures: list[np.ndarray]) -> np.ndarray:
    """x, y and radius of the objects of pictures that have one, (objects, 3)."""
    seen = [oracle.read(picture).objects for picture in pictures]
    return np.array([(item.x, item.y, item.radius) for item, *more in filter(None, seen) if not more])


def diversity(model: Imagen, count: int) -> dict[str, float]:
    """Spread of the places and mean radius of one object, over the data's: drawn at guidance weight 1, and as usual."""
    wanted = scenes("one", count)
    data = places([render(scene, model.stages[-1].resolution) for scene in wanted])
    report: dict[str, float] = {}
    for name, overrides in {
        "guidance 1": SamplingOverrides(guidance_weight=1.0),
        "as it is": SamplingOverrides(),
    }.items():
        pictures = Painter(model, overrides, None)([scene.caption for scene in wanted])
        drawn = places([picture.pixels for picture in pictures])
        for axis, letter in enumerate("xy"):
            report[f"spread of {letter}, {name}"] = float(drawn[:, axis].std() / data[:, axis].std())
        report[f"radius, {name}"] = float(drawn[:, 2].mean() / data[:, 2].mean())
    return report


def faults(report: dict[str, dict[str, float]], few_steps: bool) -> list[str]:
    """What is below its bar, a line each."""
    lines = []
    for kind, bars in BARS.items():
        for name, bar in bars.items():
            least = bar - LOSS_OF_FEW_STEPS * few_steps
            if report[kind][name] < least:
                lines.append(f"{kind}: {name} {100 * report[kind][name]:.1f} % is below {100 * least:.0f} %")
            chinese = report.get(f"{kind}_zh", report[kind])[name]
            if chinese < (english := report[kind][name]) - LOSS_OF_CHINESE:
                lines.append(
                    f"{kind}: {name} {100 * english:.1f} % in English, {100 * chinese:.1f} % in Chinese"
                )
    for name, value in report.get("diversity", {}).items():
        low, high = RADIUS if name.startswith("radius") else SPREAD
        if name.endswith("guidance 1") and not low <= value <= high:
            lines.append(f"{name}: {value:.3f} is not in {low} to {high}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="model folder (%(default)s)")
    parser.add_argument(
        "--out", type=Path, required=True, help="keeps the scores; an interrupted run goes on"
    )
    parser.add_argument("--count", type=int, default=1024, help="pictures of a kind (%(default)s)")
    parser.add_argument("--steps", type=int, help="of every stage; default: the model's")
    parser.add_argument("--guidance", type=float, help="weight of every stage; default: the model's")
    parser.add_argument(
        "--until", type=int, metavar="PIXELS", help="stop at the stage of this size: it alone"
    )
    args = parser.parse_args()
    use_cpu_devices()
    model = Imagen.load(args.model, mesh=make_mesh(MeshConfig()))
    painter = Painter(model, SamplingOverrides(steps=args.steps, guidance_weight=args.guidance), args.until)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.json"
    settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
    report: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {"settings": settings}
    if report["settings"] != settings:
        sys.exit(f"{file} is of {report['settings']}, not of {settings}; give another --out")
    jobs = {
        kind: lambda kind=kind: scores_of(painter, kind, args.count, args.out)
        for kind in (*BARS, "one_zh", "two_zh")
    }
    if args.steps is None and args.until is None:
        jobs["diversity"] = lambda: diversity(model, args.count)
    for kind, job in jobs.items():
        if kind not in report:
            report[kind] = job()
            file.write_text(json.dumps(report, indent=2) + "\n")
        print(kind, {name: round(value, 4) for name, value in report[kind].items()}, flush=True)
    below = faults(report, args.steps is not None)
    print(*below, sep="\n")
    sys.exit(bool(below))


if __name__ == "__main__":
    main()
