"""Memory and time of `imagen-jax import deepfloyd` on a random stage of several gigabytes.

python benchmarks/import_deepfloyd.py [--gigabytes=5] [--dtype=float32]

Prints as one JSON object on the last line: bytes of the stage, seconds, and the peak of the process's anonymous memory
beyond what it had before the import, with the bound it is to stay below.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from imagen_jax.convert.deepfloyd.exporting import export_pipeline
from imagen_jax.convert.deepfloyd.importing import write_stage
from imagen_jax.convert.deepfloyd.network import diffusers_config, unet_config
from imagen_jax.convert.deepfloyd.stage import stage_config
from imagen_jax.convert.lazy import LazyTensor
from imagen_jax.models.deepfloyd import DeepFloydUNetConfig
from imagen_jax.models.stage import StageNetwork


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """The largest anonymous memory while the block runs, sampled every ten milliseconds."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def network(gigabytes: float) -> DeepFloydUNetConfig:
    """I-XL's shape at the width whose float32 weights have about this size."""
    first = max(64, round(704 * (gigabytes / 17.2) ** 0.5 / 64) * 64)
    attends = (False, True, True, True)
    return DeepFloydUNetConfig(
        channels=tuple(first * each for each in (1, 2, 3, 4)),
        num_res_blocks=(3, 3, 3, 3),
        self_attention=attends,
        text_attention=attends,
        text_width=4096,
        learned_variance=True,
        text_channels=4 * first,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    config = diffusers_config(network(args.gigabytes), 64)
    stage = stage_config(config, None, low_resolution=None)
    block = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)
    shapes = StageNetwork(stage).abstract_params
    params = {
        name: LazyTensor(leaf.shape, np.float32, lambda shape=leaf.shape: np.resize(block, shape))
        for name, leaf in shapes.items()
    }
    assert unet_config(config) == stage.network
    with tempfile.TemporaryDirectory() as folder:
        export_pipeline(Path(folder) / "one", stage, params, text_encoder=None)
        stored = Path(folder) / "one" / "unet"
        target = stage_config(config, None, low_resolution=None, dtype=args.dtype)
        before, began = anonymous(), time.perf_counter()
        with Peak() as peak:
            write_stage(Path(folder) / "model", target, stored, None)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in stored.glob("*.safetensors"))
    largest = 4 * max(leaf.size for leaf in shapes.values())
    result = {
        "stage_bytes": size,
        "seconds": round(seconds, 1),
        "largest_tensor_bytes": largest,
        "peak_anonymous_bytes": peak.bytes - before,
        "bound_bytes": 3 * largest + 2**30,
        "dtype": args.dtype,
    }
    print(json.dumps(result))
    if result["peak_anonymous_bytes"] > result["bound_bytes"]:
        sys.exit("the import held more than three of the largest tensors and 1 GiB")


if __name__ == "__main__":
    main()
