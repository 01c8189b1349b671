"""What `imagen-jax plan` predicts against the TPU compiler's final schedule, for kernels and ResNet blocks.

python benchmarks/schedule.py [--chips=v4,v5e,v5p,v6e]

Needs `pip install 'imagen_jax[plan]'` and no TPU. libtpu compiles each program for a chip and writes its final
bundles; a bundle is one cycle. A loop's bundles count as often as its exit test says. What a loop does in some of its
turns only is counted once a loop and in every turn: the schedule is between the two. Memory that a schedule waits for
is not in it. A line a chip and program: least and most scheduled and the predicted microseconds, predicted / least and
predicted / most; the last line is one JSON object.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# For --programs only: "splash forward" and "splash backward", the same attention by the kernel of JAX's library.
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PROGRAMS = ("attention forward", "attention backward", "block 32x1024", "block 16x1536", "block 8x2048")
BATCH = 8

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{")
_EXIT = re.compile(r"scmp\.(?:ge|eq)\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_SKIP = re.compile(r"sbr\.rel \((%p\w+)\) target = \$region(\d+)")
_BOTH = re.compile(r"(%p\w+) = pnand (%p\w+), (%p\w+)")
_COMPARISON = re.compile(r"(%p\w+) = scmp\.(ge|lt)\.s32\.totalorder (%s\w+), (\d+)")


def _skips(lines: list[str]) -> list[tuple[range, int | None]]:
    """Bundles that a branch passes over, and in how many turns of their loop they run; None if that is not plain.

    A pipeline over blocks of an array takes a few turns more than there are blocks, to bring the first and to write
    the last; its body runs where the turn is at least one number and less than another.
    """
    text = "\n".join(lines)
    both = {name: (a, b) for name, a, b in _BOTH.findall(text)}
    compared = {name: (kind, index, int(bound)) for name, kind, index, bound in _COMPARISON.findall(text)}
    starts = {}
    for place, line in enumerate(lines):
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            starts[region] = place
    skips: list[tuple[range, int | None]] = []
    for place, line in enumerate(lines):
        for predicate, region in _SKIP.findall(line):
            if starts.get(region, 0) <= place:
                continue  # the way back of a loop
            parts = [compared.get(name, ("", "", 0)) for name in both.get(predicate, ())]
            low = next((bound for kind, _, bound in parts if kind == "ge"), None)
            high = next((bound for kind, _, bound in parts if kind == "lt"), None)
            window = low is not None and high is not None and len({index for _, index, _ in parts}) == 1
            skips.append((range(place + 1, starts[region]), high - low if window else None))
    return skips


def scheduled_cycles(bundles: str) -> tuple[int, int]:
    """Least and most cycles of one program, from the text of its final bundles.

    Loops are marked by `>` before a bundle, one for every loop around it; the bundle with the exit test of a loop,
    its last ones, names the number of turns. What a loop does in some turns only counts once in the least, in every
    turn in the most.
    """
    lines, depths = [], []
    turns: dict[int, list[tuple[int, int]]] = {}
    for line in bundles.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            if lines:
                lines[-1] += line  # a bundle's remarks
            continue
        depths.append(len(match.group(1)))
        lines.append(line)
        if test := _EXIT.search(line):
            turns.setdefault(depths[-1], []).append((len(depths) - 1, int(test.group(1))))
    least, most = [], []
    for place, depth in enumerate(depths):
        # The next exit test of a level is that of the loop around the bundle.
        counts = [
            next((count for at, count in turns.get(level, ()) if at >= place), 1)
            for level in range(1, depth + 1)
        ]
        least.append(math.prod(counts))
        most.append(math.prod(counts))
    for skipped, runs in _skips(lines):
        depth = depths[skipped.start - 1]
        if depth == 0:
            continue  # once or not at all
        around = next((count for at, count in turns.get(depth, ()) if at >= skipped.start), 1)
        for place in skipped:
            least[place] = least[place] * min(runs or 1, around) // around
            most[place] = most[place] * min(runs or around, around) // around
    return sum(least), sum(most)


def read_dump(folder: Path) -> tuple[int, int]:
    """Least and most cycles of all operations of a program that was compiled into the folder."""
    texts = (path.read_text() for path in folder.glob("*-final_bundles.txt") if "analysis" not in path.name)
    cycles = [scheduled_cycles(text) for text in texts]
    return sum(least for least, _ in cycles), sum(most for _, most in cycles)


def _splash(query: Any, key: Any, value: Any, mask: Any, *, heads: int) -> Any:
    """The same by the splash attention of JAX's library, whose masks are segments, with its largest blocks."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (queries, channels), keys = query.shape[1:], key.shape[1]
    block = max(size for size in range(128, keys + 1, 128) if keys % size == 0)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=queries,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=queries,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
    )

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    segments = splash.SegmentIds(jnp.ones((len(query), queries), jnp.int32), mask.astype(jnp.int32))
    scale = (channels // heads) ** -0.5
    out = jax.vmap(kernel)(split(query) * scale, split(key), split(value), segments)
    return out.swapaxes(1, 2).reshape(query.shape)


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

    if name.startswith(("attention", "splash")):
        # The base's level of 32×32 positions with 128 tokens of text.
        query, key, mask = (
            shape(BATCH, 1024, 1024),
            shape(BATCH, 1152, 1024),
            shape(BATCH, 1152, dtype=jnp.bool_),
        )

        def forward(q: Any, k: Any, v: Any, m: Any) -> Any:
            if name.startswith("splash"):
                return _splash(q, k, v, m, heads=16)
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
                bounds = [cycles / planned["clock_hz"] for cycles in read_dump(Path(folder))]
            ratios = [planned["seconds"] / seconds for seconds in bounds]
            print(
                f"{chip} {name}: {1e6 * bounds[0]:.0f} to {1e6 * bounds[1]:.0f} us, "
                f"predicted {1e6 * planned['seconds']:.0f} us, {ratios[0]:.2f} to {ratios[1]:.2f}",
                flush=True,
            )
            results.append(
                {"chip": chip, "program": name, "scheduled_s": bounds, **planned, "ratios": ratios}
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
