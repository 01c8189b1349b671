"""What `imagen-jax plan` predicts against the TPU compiler's final schedule, for kernels and ResNet blocks.

python benchmarks/schedule.py [--chips=v4,v5e,v5p,v6e]

Needs `pip install 'imagen_jax[plan]'` and no TPU. libtpu compiles each program for a chip and writes its final
bundles; a bundle is one cycle. A loop's bundles count as often as its exit test says, and what a kernel does in some
turns of its grid only counts in every turn, so that the schedule is an upper bound of itself. Memory that a schedule
waits for is not in it. A line a chip and program: scheduled and predicted microseconds and predicted / scheduled; the
last line is one JSON object.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PROGRAMS = ("attention forward", "attention backward", "block 32x1024", "block 16x1536", "block 8x2048")
BATCH = 8

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{")
_EXIT = re.compile(r"scmp\.(?:ge|eq)\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")


def scheduled_cycles(bundles: str) -> int:
    """Cycles of one program, from the text of its final bundles.

    Loops are marked by `>` before a bundle, one for every loop around it; the bundle with the exit test of a loop,
    its last ones, names the number of turns.
    """
    depths: list[int] = []
    turns: dict[int, list[tuple[int, int]]] = {}
    for line in bundles.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        depth = len(match.group(1))
        if test := _EXIT.search(line):
            turns.setdefault(depth, []).append((len(depths), int(test.group(1))))
        depths.append(depth)
    cycles = 0
    for place, depth in enumerate(depths):
        times = 1
        for level in range(1, depth + 1):
            # The next exit test of that level is that of the loop around the bundle.
            times *= next((count for at, count in turns.get(level, ()) if at >= place), 1)
        cycles += times
    return cycles


def read_dump(folder: Path) -> int:
    """Cycles of all operations of a program that was compiled into the folder."""
    texts = (path.read_text() for path in folder.glob("*-final_bundles.txt") if "analysis" not in path.name)
    return sum(map(scheduled_cycles, texts))


def _program(name: str, mesh: Any) -> tuple[Callable[..., Any], list[Any]]:
    """A function and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from imagen_jax.models.attention import attend
    from imagen_jax.models.execution import Execution
    from imagen_jax.models.layers import ResNetBlock
    from imagen_jax.models.network import Attention

    def shape(*sides: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    if name.startswith("attention"):
        # The base's level of 32×32 positions with 128 tokens of text.
        query, key, mask = (
            shape(BATCH, 1024, 1024),
            shape(BATCH, 1152, 1024),
            shape(BATCH, 1152, dtype=jnp.bool_),
        )

        def forward(q: Any, k: Any, v: Any, m: Any) -> Any:
            with Execution(mesh=mesh).active():
                return attend(q, k, v, m, heads=16, kind=Attention.FLASH)

        if name.endswith("forward"):
            return forward, [query, key, key, mask]

        def backward(q: Any, k: Any, v: Any, m: Any, d: Any) -> Any:
            return jax.vjp(lambda *qkv: forward(*qkv, m), q, k, v)[1](d)

        return backward, [query, key, key, mask, query]
    side, channels = map(int, re.findall(r"\d+", name))
    width, dtype = 2048, jnp.dtype(jnp.bfloat16)
    block = nnx.eval_shape(
        lambda: ResNetBlock(channels, channels, embedding_width=width, dtype=dtype, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(block)
    params = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), state)

    def gradient(params: Any, x: Any, embedding: Any, d: Any) -> Any:
        def run(params: Any, x: Any) -> Any:
            return nnx.merge(graph, params)(x, embedding)

        return jax.vjp(run, params, x)[1](d)

    picture = shape(BATCH, side, side, channels)
    return gradient, [params, picture, shape(BATCH, width), picture]


def predict(chip: str, name: str) -> dict[str, float]:
    """What the planner predicts of a program, and the cycles a second that it takes the chip to do."""
    from imagen_jax.plan.environment import find_compiler

    find_compiler()
    import jax

    from imagen_jax.parallel.mesh import MeshConfig, make_mesh
    from imagen_jax.plan.chips import parse_topology
    from imagen_jax.plan.compile import slice_devices
    from imagen_jax.plan.estimate import estimate

    topology = parse_topology(SLICES[chip])
    devices = slice_devices(topology)[:1]
    function, shapes = _program(name, make_mesh(MeshConfig(), devices))
    compiled = jax.jit(function).lower(*shapes).compile()
    found = estimate(compiled, topology, devices)
    return {"seconds": found.seconds, "kernel_s": found.kernel_s, "clock_hz": topology.chip.clock_hz}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", default=",".join(SLICES), help="default: all")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="default: all")
    parser.add_argument("--predict", nargs=2, metavar=("CHIP", "PROGRAM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict:
        print(json.dumps(predict(*args.predict)))
        return
    results = []
    for chip in args.chips.split(","):
        for name in args.programs.split(","):
            with tempfile.TemporaryDirectory() as folder:
                flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
                command = [sys.executable, __file__, "--predict", chip, name]
                done = subprocess.run(
                    command, env={**os.environ, "LIBTPU_INIT_ARGS": flags}, stdout=subprocess.PIPE, check=True
                )
                planned = json.loads(done.stdout.splitlines()[-1])
                scheduled = read_dump(Path(folder)) / planned["clock_hz"]
            ratio = planned["seconds"] / scheduled
            print(
                f"{chip} {name}: {1e6 * scheduled:.0f} us, predicted {1e6 * planned['seconds']:.0f} us, {ratio:.2f}"
            )
            results.append(
                {"chip": chip, "program": name, "scheduled_s": scheduled, **planned, "ratio": ratio}
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
