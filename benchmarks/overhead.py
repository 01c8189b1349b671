"""What a training run spends outside its compiled step, and how long a save holds it up.

python benchmarks/overhead.py

Trains a small stage on generated records with the real loop, 200 steps after warming up, with a line of metrics every
10 steps. Runs of 20 steps are timed as a whole; between them the same compiled step is timed alone, on a batch that
stays where it is. Then every `--save_every` steps a checkpoint is saved. The last line is one JSON object:

  step_s             seconds of the compiled step alone, median
  loop_s             seconds a step of the loop takes, median over the runs
  outside_share      (loop_s − step_s) / loop_s
  save_s             seconds from the beginning of a save to its end on the disk, median
  save_blocks_s      seconds of it during which the loop stands still, median
  save_blocks_share  their ratio, median
  checksums_s        seconds of the standstill that checksums take, median
  checksums_share    their share of the whole save, median
  checkpoint_mb      size of a checkpoint
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from imagen_jax.config import build
from imagen_jax.data import shapes_captions
from imagen_jax.parallel.mesh import use_cpu_devices
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.text.small import make_small_encoder
from imagen_jax.training import checkpoint, trainer
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.state import TrainState, state_bytes

ALONE = 4  # steps timed alone between two runs


def make_config(folder: Path, args: argparse.Namespace, steps: int, checkpoint_every: int) -> TrainConfig:
    """A base stage on the embedded data."""
    network = {
        "kind": "unet",
        "channels": [args.channels, 2 * args.channels],
        "num_res_blocks": [2, 2],
        "self_attention": [False, True],
        "text_attention": [False, True],
        "head_channels": 16,
        "embedding_width": 128,
        "text_width": 32,
    }
    stage = {
        "name": "base",
        "resolution": 32,
        "max_text_length": 16,
        "network": network,
        "prediction": "v",
    }
    values = {
        "stage": stage,
        "loss": {"space": "v"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "data": {"path": str(folder / "records"), "batch_size": args.batch_size, "num_threads": 2},
        "train": {
            "steps": steps,
            "log_every": 10,
            "checkpoint_every": checkpoint_every,
            "sample_every": 0,
        },
    }
    return build(TrainConfig, values, "config")


def make_records(folder: Path) -> None:
    """512 pictures of shapes with embeddings."""
    encoder = folder / "encoder"
    make_small_encoder(encoder, vocabulary_texts=shapes_captions.all_captions(), width=32, layers=1)
    precompute(
        PrecomputeConfig(
            source="shapes:count=512,resolution=32", text_encoder=str(encoder), out=str(folder / "records")
        )
    )


class Times:
    """Stands between the loop and its step: times runs of free steps, and between them the step alone."""

    def __init__(self, warm_up: int, run: int):
        self.warm_up, self.run = warm_up, run
        self.alone: list[float] = []
        self.loop: list[float] = []
        self._make = trainer.make_train_step

    def make(self, *arguments: Any) -> Callable[[TrainState, Any], Any]:
        """In place of `make_train_step`."""
        step, count, begin = self._make(*arguments), -self.warm_up, 0.0

        def timed(state: TrainState, batch: Any, null: Any) -> Any:
            nonlocal count, begin
            if count >= 0 and count % self.run == 0:
                # Steps are dispatched ahead: a run begins and ends with devices that have nothing to do.
                jax.block_until_ready((state, batch))
                if count:
                    self.loop.append((time.perf_counter() - begin) / self.run)
                for _ in range(ALONE):
                    start = time.perf_counter()
                    state, _ = jax.block_until_ready(step(state, batch, null))
                    self.alone.append(time.perf_counter() - start)
                begin = time.perf_counter()
            count += 1
            return step(state, batch, null)

        return timed


def time_loop(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The loop without saves."""
    steps = args.warm_up + args.steps + 1  # the one after the last run ends it
    times = Times(args.warm_up, args.run)
    trainer.make_train_step = times.make  # type: ignore[assignment]
    trainer.train(make_config(folder, args, steps, checkpoint_every=10 * steps), folder / "loop")
    step, loop = statistics.median(times.alone), statistics.median(times.loop)
    trainer.make_train_step = times._make
    return {
        "step_s": round(step, 4),
        "loop_s": round(loop, 4),
        "outside_share": round(1 - step / loop, 4),
        "steps": len(times.loop) * args.run,
    }


def time_saves(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The loop with saves: how long the call holds it up, and when the checkpoint has its name."""
    begun: dict[int, float] = {}
    blocks: dict[int, float] = {}
    ended: dict[int, float] = {}
    checksums: dict[int, float] = {}
    sizes: list[int] = []
    save, begin_checksums = Checkpoints.save, checkpoint.begin_checksums

    def timed_checksums(state: TrainState) -> Callable[[], dict[str, int]]:
        # The arrays are there: what is measured is not the wait for the step.
        step, started = int(jax.block_until_ready(state).step), time.perf_counter()
        finish = begin_checksums(state)
        checksums[step] = time.perf_counter() - started
        return finish

    def timed_save(self: Checkpoints, step: int, state: TrainState, **rest: Any) -> None:
        sizes.append(state_bytes(state))
        self.wait()  # of the one before, which is not this one's time
        begun[step] = time.perf_counter()
        save(self, step, state, **rest)
        blocks[step] = time.perf_counter() - begun[step]

    steps = args.save_every * args.saves
    config = make_config(folder, args, steps, checkpoint_every=args.save_every)
    advance = trainer.MetricsWriter.advance

    def noting_advance(self: trainer.MetricsWriter) -> None:
        advance(self)
        for step in begun.keys() - ended.keys():
            if (folder / "saves" / "checkpoints" / str(step)).exists():
                ended[step] = time.perf_counter()

    Checkpoints.save = timed_save  # type: ignore[method-assign]
    checkpoint.begin_checksums = timed_checksums
    trainer.MetricsWriter.advance = noting_advance  # type: ignore[method-assign]
    trainer.train(config, folder / "saves")
    seen = sorted(ended)[1:]  # the first starts threads and imports
    durations = {step: ended[step] - begun[step] for step in seen}
    return {
        "save_s": round(statistics.median(durations.values()), 4),
        "save_blocks_s": round(statistics.median(blocks[step] for step in seen), 4),
        "save_blocks_share": round(statistics.median(blocks[step] / durations[step] for step in seen), 4),
        "checksums_s": round(statistics.median(checksums[step] for step in seen), 4),
        "checksums_share": round(statistics.median(checksums[step] / durations[step] for step in seen), 4),
        "saves": len(seen),
        "checkpoint_mb": round(sizes[0] / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm_up", type=int, default=10, help="steps that are not counted (%(default)s)")
    parser.add_argument("--run", type=int, default=20, help="steps timed together (%(default)s)")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--save_every", type=int, default=12)
    parser.add_argument("--saves", type=int, default=8)
    args = parser.parse_args()
    use_cpu_devices(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_records(folder)
        report = time_loop(folder, args)
        print(report, flush=True)
        report |= time_saves(folder, args)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
