"""Seconds of `imagen-jax sample` in which no network step runs: the first time, and ever after.

python benchmarks/start_up.py --model=MODEL --whole
python benchmarks/start_up.py --config=imagen/base64.py:small

With --config the model is that one stage with random weights and a small text encoder of the width it asks for. Each
run is a process of its own, with the same prompt shape but another prompt; the first one of a pair finds an
empty cache folder. The clock starts before Python does. The last line is one JSON object: seconds of each run, the
median of each kind, and the ratio of the medians: `before_step` until the base stage's first step, and with --whole
`no_step` of the whole command, all stages and the pictures' files included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Says when the first step begins, and of the whole command how long its steps take; without --whole it ends there.
# Nothing is imported earlier than the command itself imports it.
CODE = """
import os, sys, time
import imagen_jax.cli.main as cli
import imagen_jax.cli.sample as sample
whole, steps, draw = os.environ["WHOLE"] == "1", [], sample._draw
def watched(*args):
    import jax
    from imagen_jax.sampling.programs import StageProgram
    call = StageProgram.__call__
    def timed(self, *rest):
        if not steps:
            print("first", time.time(), flush=True)
            if not whole:
                os._exit(0)
        started = time.time()
        made = jax.block_until_ready(call(self, *rest))
        steps.append(time.time() - started)
        return made
    StageProgram.__call__ = timed
    return draw(*args)
sample._draw = watched
code = cli.main(sys.argv[1:])
print("steps", sum(steps), flush=True)
sys.exit(code)
"""


def run(model: str, prompt: str, pictures: int, cache: Path, whole: bool) -> dict[str, float]:
    """Seconds of one command."""
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--model={model}", f"--out={out}", f"--num_images={pictures}", f"--cache={cache}"]
        environment = {
            name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
        }
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", CODE, "sample", prompt, *flags],
            env=environment | {"WHOLE": "1" if whole else "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        ended = time.time()
        said = dict(
            line.split() for line in done.stdout.splitlines() if line.startswith(("first ", "steps "))
        )
        seconds = {"before_step": float(said["first"]) - started}
        return seconds | ({"no_step": ended - started - float(said["steps"])} if whole else {})


def random_model(config: str, folder: Path) -> str:
    """A model folder of one stage with random weights."""
    import numpy as np

    from imagen_jax.models.stage import StageNetwork
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage
    from imagen_jax.text.small import make_small_encoder
    from imagen_jax.training.config import load_config

    stage = load_config(config, []).stage
    generator = np.random.default_rng(0)
    shapes = StageNetwork(stage).abstract_params
    params = {name: 0.02 * generator.standard_normal(each.shape, np.float32) for name, each in shapes.items()}
    save_stage(folder, stage, params)
    make_small_encoder(
        folder / "text_encoder",
        vocabulary_texts=("a red circle", "a blue square"),
        width=stage.network.text_width,
        layers=1,
    )
    save_index(folder, ModelIndex(stages=(stage.name,), text_encoder="text_encoder"))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a model folder")
    which.add_argument("--config", help="of a base stage")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3, help="an empty cache and a full one, so many times")
    parser.add_argument("--again", type=int, default=2, help="runs on each full cache")
    parser.add_argument("--whole", action="store_true", help="to the end, with the model's own steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, args.model or random_model(args.config, Path(folder)))


def measure(args: argparse.Namespace, model: str) -> None:
    first, later = [], []
    for pair in range(args.pairs):
        with tempfile.TemporaryDirectory() as cache:
            first.append(run(model, "a red circle", args.pictures, Path(cache), args.whole))
            for _ in range(args.again):
                later.append(run(model, "a blue square", args.pictures, Path(cache), args.whole))
        print(pair, first[-1], later[-args.again :], flush=True)
    report = {}
    for name in first[0]:
        seconds = [[each[name] for each in runs] for runs in (first, later)]
        medians = [statistics.median(each) for each in seconds]
        report[name] = {"first": seconds[0], "later": seconds[1], "median_first_s": medians[0]}
        report[name] |= {"median_later_s": medians[1], "ratio": medians[1] / medians[0]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
