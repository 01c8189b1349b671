"""Seconds from the start of `imagen-jax sample` to its first network step: the first time, and ever after.

python benchmarks/start_up.py --config=imagen/base64.py:small
python benchmarks/start_up.py --model=MODEL

With --config the model is that one stage with random weights and a small text encoder of the width it asks for. Each
run is a process of its own, with the same prompt shape but another prompt; the first one of a pair finds an
empty cache folder. The clock starts before Python does. The last line is one JSON object: seconds of each run, the
median of each kind, and the ratio of the medians, for the step that follows the base stage's start.
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

# Ends the process at the first call of a stage's program, when all there is to prepare is prepared.
CODE = """
import sys, time
import imagen_jax.cli.main as cli
import imagen_jax.sampling.programs as programs
def first_step(self, *rest):
    print(time.time(), flush=True)
    import os
    os._exit(0)
programs.StageProgram.__call__ = first_step
cli.main(sys.argv[1:])
"""


def seconds_to_first_step(model: str, prompt: str, pictures: int, cache: Path) -> float:
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--model={model}", f"--out={out}", f"--num_images={pictures}", f"--cache={cache}"]
        environment = {
            name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
        }
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", CODE, "sample", prompt, *flags],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout.split()[-1]) - started


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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, args.model or random_model(args.config, Path(folder)))


def measure(args: argparse.Namespace, model: str) -> None:
    first, later = [], []
    for pair in range(args.pairs):
        with tempfile.TemporaryDirectory() as cache:
            first.append(seconds_to_first_step(model, "a red circle", args.pictures, Path(cache)))
            for _ in range(args.again):
                later.append(seconds_to_first_step(model, "a blue square", args.pictures, Path(cache)))
        print(pair, round(first[-1], 2), [round(each, 2) for each in later[-args.again :]], flush=True)
    medians = statistics.median(first), statistics.median(later)
    report = {"first": first, "later": later, "median_first_s": medians[0], "median_later_s": medians[1]}
    print(json.dumps(report | {"ratio": medians[1] / medians[0]}))


if __name__ == "__main__":
    main()
