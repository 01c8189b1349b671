"""Training steps of the paper's stages, with the largest batch that fits; and what XLA's flags change."""

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from common import Results, is_out_of_memory, kernels, mfu, peak_gib, seconds

from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.plan.compile import null_text, training_batch
from imagen_jax.plan.flops import forward_flops
from imagen_jax.training.config import TrainConfig, load_config
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import make_train_step

BATCHES = {"base64": (32, 24, 16, 8, 4), "sr256": (64, 48, 32, 16, 8)}
# Of those that maxdiffusion and MaxText set on GPUs, those that concern one GPU; one at a time beside XLA's own choice.
FLAGS = (
    "",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_autotune_level=4",
)


def config_of(stage: str, batch: int, *, tiny: bool) -> TrainConfig:
    """A paper stage on one device."""
    variant = ":debug" if tiny else ""
    overrides = [f"--config.data.batch_size={batch}", "--config.mesh.data=1", "--config.mesh.fsdp=1"]
    return load_config(f"imagen/{stage}.py{variant}", overrides)


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes: normal numbers, bytes of all values, true."""
    generator = np.random.default_rng(seed)

    def array(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.dtype == np.bool_:
            return np.ones(leaf.shape, np.bool_)
        if np.issubdtype(leaf.dtype, np.integer):
            return generator.integers(0, 256, leaf.shape).astype(leaf.dtype)
        return generator.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: jax.device_put(array(leaf), leaf.sharding), shapes)


def measure_step(stage: str, batch: int, *, tiny: bool, repeats: int = 10) -> dict[str, Any]:
    """Seconds, share of the peak, memory and kernels of a training step."""
    config = config_of(stage, batch, tiny=tiny)
    run = Run.of(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    examples = random_like(training_batch(config, run.mesh))
    null = random_like(null_text(config, run.mesh))
    step = make_train_step(run)
    states = [run.init()]

    def once() -> Any:
        state, metrics = step(states.pop(), examples, null)
        states.append(state)
        return metrics["loss"]

    jax.block_until_ready(once())
    second = seconds(once, repeats)
    flops = 3 * forward_flops(run.network, size=config.step_size) * batch
    return {
        "batch": batch,
        "ms": 1e3 * second,
        "pictures_per_s": batch / second,
        "mfu": mfu(flops, second),
        "peak_gib": peak_gib(),
        "kernels": kernels(once),
    }


def measure_stage(results: Results, stage: str) -> None:
    """The largest batch that fits: each is tried in a process, so that nothing of it is left."""
    for batch in (2,) if results.tiny else BATCHES[stage]:
        command = [sys.executable, __file__, stage, str(batch), str(results.folder), str(int(results.tiny))]
        if subprocess.run(command).returncode == 0:
            return
    raise SystemExit(f"{stage}: no batch fits")


def measure_flags(results: Results) -> None:
    """A step of SR256 under XLA's flags, in processes of their own."""
    for flags in FLAGS[:2] if results.tiny else FLAGS:
        if flags.startswith("--xla_gpu") and jax.default_backend() != "gpu":
            continue
        command = [
            sys.executable,
            __file__,
            "sr256",
            "2" if results.tiny else "16",
            "-",
            str(int(results.tiny)),
        ]
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.split()
        results.add("flags", {flags or "none": float(lines[-1]) if done.returncode == 0 else None})


def main() -> None:
    """STAGE BATCH FOLDER TINY; the folder - prints the step's milliseconds only."""
    stage, batch, folder, tiny = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "1"
    try:
        values = measure_step(stage, batch, tiny=tiny)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"  {stage} with {batch} pictures does not fit", flush=True)
        raise SystemExit(3) from None
    if folder == "-":
        print(values["ms"])
    else:
        from pathlib import Path

        Results(folder=Path(folder), tiny=tiny).add(stage, values)


if __name__ == "__main__":
    main()
