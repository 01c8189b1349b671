"""Few steps of DPM-Solver++ against many of DDPM on the quickstart's model, and what guidance does there.

pip install -e '.[plot]'
python benchmarks/sampler_scores.py --model=runs/quickstart/model --out=DIR

All samplers draw the same held-out captions from the same seeds, every stage with so many steps; the oracle says what
each picture has of its caption. Then `--sweep_seeds` pictures are drawn at each guidance weight of the base stage and
of the other stages, with the few steps; DIR/guidance.png shows how many are wholly right, with standard errors. The
last line is one JSON object: findings in per cent, differences in points (few − many) of DPM-Solver++ (2M) and of its
SDE variant, their standard errors over the pairs, and the sweep. An interrupted run goes on where it was.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from paired_scores import compared, findings, percent

from imagen_jax.diffusion.samplers import Sampler, SamplerConfig
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.parallel.mesh import MeshConfig, make_mesh, use_cpu_devices
from imagen_jax.sampling.cascade import Imagen

WEIGHTS = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def with_sampler(model: Imagen, kind: Sampler, steps: int) -> dict[str, SamplingConfig]:
    """The stages' own settings, but for sampler and steps."""
    sampler = SamplerConfig(kind=kind, steps=steps)
    return {stage.name: dataclasses.replace(stage.sampling, sampler=sampler) for stage in model.stages}


def sweep(
    model: Imagen, settings: dict[str, SamplingConfig], seeds: int, out: Path
) -> dict[str, dict[float, float]]:
    """Share of pictures that are wholly right, in per cent, by which stages are swept and their weight."""
    base, *others = (stage.name for stage in model.stages)
    shares: dict[str, dict[float, float]] = {}
    for label, swept in {"base": [base], "super-resolution": others}.items():
        shares[label] = {}
        for weight in WEIGHTS:
            changed = {name: dataclasses.replace(settings[name], guidance_weight=weight) for name in swept}
            rows = findings(model, seeds, out / f"{label}_{weight:g}.npy", settings | changed)
            shares[label][weight] = percent(rows)["fulfilled"]
    return shares


def plot(shares: dict[str, dict[float, float]], own: dict[str, float], seeds: int, path: Path) -> None:
    """The sweep as a picture; `own` are the weights of the stages that a line leaves alone."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for label, line in shares.items():
        errors = [100 * math.sqrt(share / 100 * (1 - share / 100) / seeds) for share in line.values()]
        other = next(name for name in shares if name != label)
        axes.errorbar(
            list(line),
            list(line.values()),
            yerr=errors,
            marker="o",
            capsize=3,
            label=f"of the {label} stage ({other}: {own[other]:g})",
        )
    axes.set(
        xlabel="guidance weight (1 is off)",
        ylabel="pictures wholly right, %",
        title=f"Guidance, quickstart's model, {seeds} held-out captions a point",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder of the quickstart")
    parser.add_argument("--out", type=Path, required=True, help="keeps findings; an interrupted run goes on")
    parser.add_argument("--seeds", type=int, default=2048, help="pictures of each sampler (%(default)s)")
    parser.add_argument("--few", type=int, default=16, help="steps of DPM-Solver++ (%(default)s)")
    parser.add_argument("--many", type=int, default=256, help="steps of DDPM (%(default)s)")
    parser.add_argument(
        "--sweep_seeds", type=int, default=256, help="pictures a guidance weight (%(default)s)"
    )
    args = parser.parse_args()
    use_cpu_devices()
    model = Imagen.load(args.model, mesh=make_mesh(MeshConfig()))
    settings = {
        f"{kind.value}_{steps}": with_sampler(model, kind, steps)
        for kind, steps in (
            (Sampler.DPMPP, args.few),
            (Sampler.DPMPP_SDE, args.few),
            (Sampler.DDPM, args.many),
        )
    }
    shares = sweep(model, settings[f"dpmpp_{args.few}"], args.sweep_seeds, args.out)
    base, second, *_ = (stage.sampling.guidance_weight for stage in model.stages)
    own = {"base": base, "super-resolution": second}
    plot(shares, own, args.sweep_seeds, args.out / "guidance.png")
    found = {
        name: findings(model, args.seeds, args.out / f"{name}.npy", each) for name, each in settings.items()
    }
    report: dict[str, Any] = {"seeds": args.seeds, **{name: percent(rows) for name, rows in found.items()}}
    *few_steps, many_steps = found
    for name in few_steps:
        report[f"{name} - {many_steps}"] = compared(found[name], found[many_steps])
    print(json.dumps(report | {"sweep": shares}))


if __name__ == "__main__":
    main()
