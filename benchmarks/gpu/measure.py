"""One part of the measurements: python benchmarks/gpu/measure.py PART --results=DIR [--tiny] (see gpu.sh)."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
# A part's processes follow each other on the device, and some hold PyTorch's arrays beside JAX's.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from common import Results


def numerics(results: Results) -> None:
    from numerics import measure

    measure(results)


def base64(results: Results) -> None:
    from training import measure_stage

    measure_stage(results, "base64")


def sr256(results: Results) -> None:
    from training import measure_stage

    measure_stage(results, "sr256")


def flags(results: Results) -> None:
    from training import measure_flags

    measure_flags(results)


def deepfloyd(results: Results) -> None:
    from beside_torch import measure_deepfloyd

    measure_deepfloyd(results)


def t5(results: Results) -> None:
    from beside_torch import measure_t5

    measure_t5(results)


def _command(*arguments: str) -> float:
    """Seconds of an imagen-jax command that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "imagen_jax", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"imagen-jax {arguments[0]} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - start


def smoke(results: Results) -> None:
    """Every verb that needs no page: the quickstart's small scale has precompute, train, export and sample in it."""
    with tempfile.TemporaryDirectory() as folder:
        results.add("smoke", {"quickstart_s": _command("quickstart", "--scale=smoke", f"--out={folder}/q")})
        model = f"--model={folder}/q/model"
        results.add("smoke", {"sample_s": _command("sample", "a red circle", model, f"--out={folder}/p")})
        records = f"--config.data.path={folder}/q/records"
        train = ("train", "--config=shapes/base16.py:smoke", records, f"--workdir={folder}/w")
        results.add("smoke", {"train_s": _command(*train)})
        export = (
            "export",
            f"--from={folder}/w",
            f"--text_encoder={folder}/q/text_encoder",
            f"--out={folder}/m",
        )
        results.add("smoke", {"export_s": _command(*export)})
        plan = ("plan", "--config=shapes/base16.py:smoke", "--device=h100")
        results.add("smoke", {"plan_s": _command(*plan)})


def quickstart(results: Results) -> None:
    """The whole quickstart, in minutes."""
    scale = "smoke" if results.tiny else "full"
    with tempfile.TemporaryDirectory() as folder:
        taken = _command("quickstart", f"--scale={scale}", f"--out={folder}/q")
        results.add("quickstart", {"minutes": taken / 60})


PARTS = {part.__name__: part for part in (numerics, base64, sr256, deepfloyd, t5, smoke, quickstart, flags)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    results = Results(folder=args.results, tiny=args.tiny)
    results.begin(args.part)
    start = time.perf_counter()
    PARTS[args.part](results)
    results.add(args.part, {"part_s": time.perf_counter() - start})


if __name__ == "__main__":
    main()
