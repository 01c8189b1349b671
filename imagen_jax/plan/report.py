"""The plan of a stage: everything predicted of it, as text for people and JSON for programs."""

import dataclasses
import importlib.metadata
from typing import Any

from imagen_jax.plan.chips import Topology
from imagen_jax.plan.compile import Compiled, Program, compile_stage, slice_devices
from imagen_jax.plan.estimate import Estimate, estimate
from imagen_jax.plan.flops import forward_flops
from imagen_jax.plan.memory import Memory, account, program_bytes
from imagen_jax.plan.suggest import suggestions
from imagen_jax.training.config import TrainConfig

# Above this share of the time, hand-written kernels, of which the compiler says nothing, carry the prediction.
KERNEL_SHARE = 0.2
OPERATIONS = 10  # costliest ones in a report
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one program of a stage is predicted to need on a slice."""

    stage: str
    program: Program
    topology: Topology
    mesh: dict[str, int]  # devices along each axis
    batch_size: int  # pictures over all chips
    params: int  # number of them
    memory: Memory  # of each chip
    forward_flops: int  # of one network call on one picture
    # Forward passes' worth of FLOPs for a picture: 3 in training, else the network calls, twice where guided.
    calls_per_image: int
    network_steps: int  # of a run: 1 in training, a sampler's network calls
    estimate: Estimate | None  # of one run; None: the program was refused for want of memory
    compile_s: float
    suggestions: tuple[str, ...]  # where it does not fit
    operation_kib: int | None = None  # on-chip memory that an operation was kept to

    @property
    def step_s(self) -> float | None:
        """Predicted seconds of a training step, or of one network step of a sampler."""
        return None if self.estimate is None else self.estimate.seconds / self.network_steps

    @property
    def mfu(self) -> float | None:
        """Predicted model FLOPs over what the chips could do in that time; recomputation is no model FLOP."""
        if self.estimate is None:
            return None
        flops = self.forward_flops * self.calls_per_image * self.batch_size / self.topology.count
        return flops / (self.estimate.seconds * self.topology.chip.peak_flops)

    @property
    def images_per_s(self) -> float | None:
        """Predicted pictures a second, trained on or made, over all chips."""
        return None if self.estimate is None else self.batch_size / self.estimate.seconds

    @property
    def warnings(self) -> list[str]:
        """What makes the prediction less certain."""
        lines = []
        if self.estimate is not None and self.estimate.kernel_s > KERNEL_SHARE * self.estimate.seconds:
            share = self.estimate.kernel_s / self.estimate.seconds
            lines.append(
                f"{share:.0%} of the time is hand-written kernels, reckoned by a rate, not by the compiler"
            )
        if self.operation_kib is not None:
            lines.append(
                f"operations were kept to {self.operation_kib} KiB: train runs another, faster program"
            )
        if self.estimate is not None and self.estimate.unknown_loops:
            lines.append(f"loops of unknown length count once: {', '.join(self.estimate.unknown_loops)}")
        return lines


def make_plan(
    config: TrainConfig,
    topology: Topology,
    program: Program,
    *,
    rows: int = 1,
    operation_kib: int | None = None,
    progress: bool = False,
) -> Plan:
    """Compiles a stage's program for a slice and predicts what it needs.

    Args:
      config: the stage, its mesh and batch size.
      topology: the slice.
      program: what of the stage.
      rows: devices over which each picture's rows are split, when sampling.
      operation_kib: see `compile_stage`.
      progress: whether to show on stderr how long compiling takes.

    Raises:
      UserError: for a slice that there is not, or a mesh, rows or batch that do not fit it.
    """
    devices = slice_devices(topology)
    compiled = compile_stage(
        config, devices, program, rows=rows, operation_kib=operation_kib, progress=progress
    )
    memory = _memory(compiled, program, topology)
    stage = config.stage
    train = program is Program.TRAIN
    calls = 1 if train else stage.sampling.sampler.network_calls
    found = (
        None if compiled.program is None else estimate(compiled.program, topology, compiled.mesh.devices.flat)
    )
    return Plan(
        stage=stage.name,
        program=program,
        topology=topology,
        mesh={axis: int(size) for axis, size in compiled.mesh.shape.items()},
        batch_size=config.data.batch_size,
        params=compiled.network.parameter_count(),
        memory=memory,
        forward_flops=forward_flops(compiled.network, size=config.step_size if train else config.size),
        calls_per_image=3 if train else calls * (1 if stage.sampling.guidance_weight == 1.0 else 2),
        network_steps=calls,
        estimate=found,
        compile_s=compiled.seconds,
        operation_kib=operation_kib,
        suggestions=() if memory.fits else tuple(suggestions(config, topology, compiled, program, memory)),
    )


def _memory(compiled: Compiled, program: Program, topology: Topology) -> Memory:
    stats = None if compiled.program is None else compiled.program.memory_analysis()
    total = compiled.needed_bytes if stats is None else program_bytes(stats)
    return account(
        compiled.state,
        compiled.batch,
        total=total or 0,
        program=0 if stats is None else stats.generated_code_size_in_bytes,
        # The trainer puts the next batch on the devices while they work on this one.
        prefetched=program is Program.TRAIN,
        available=topology.chip.hbm_bytes,
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers; bytes are of one chip, seconds are predictions."""
    found = plan.estimate
    return {
        "stage": plan.stage,
        "program": plan.program.value,
        "topology": plan.topology.slice_name,
        "slices": plan.topology.slices,
        "chips": plan.topology.count,
        "mesh": plan.mesh,
        "batch_size": plan.batch_size,
        "images_per_chip": plan.batch_size / plan.topology.count,
        "params": plan.params,
        "fits": plan.memory.fits,
        "hbm_used_bytes": plan.memory.used,
        "hbm_bytes": plan.memory.available,
        "hbm_left_bytes": plan.memory.left,
        "memory_bytes": {
            name: value for name, value in dataclasses.asdict(plan.memory).items() if name != "available"
        },
        "model_flops_per_image": plan.forward_flops,
        "program_flops_per_image": plan.forward_flops * plan.calls_per_image,
        "network_steps": plan.network_steps,
        "predicted_step_s": plan.step_s,
        "predicted_mfu": plan.mfu,
        "predicted_images_per_s": plan.images_per_s,
        "predicted_run_s": None if found is None else dataclasses.asdict(found) | _shortened(found),
        "compile_s": round(plan.compile_s, 1),
        "suggestions": list(plan.suggestions),
        "warnings": plan.warnings,
        "peak_flops": plan.topology.chip.peak_flops,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


def _shortened(found: Estimate) -> dict[str, Any]:
    """The costliest operations, as records."""
    return {
        "operations": [
            {**dataclasses.asdict(origin), "seconds": seconds, "share": seconds / found.seconds}
            for origin, seconds in found.operations[:OPERATIONS]
        ]
    }


def to_text(plan: Plan) -> str:
    """The plan for people."""
    what = "one training step on" if plan.program is Program.TRAIN else "sampling"
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.stage} on {plan.topology.name}: {what} {plan.batch_size} pictures, mesh {mesh}",
        f"compiled in {plan.compile_s:.0f} s; all times are predictions, nothing was run",
        "",
        f"{'parameters':<28}{plan.params:>16,}",
        f"{'model GFLOP a picture':<28}{plan.forward_flops / 1e9:>16,.1f}  forward",
        "",
        *_memory_lines(plan),
    ]
    if plan.estimate is not None:
        lines += ["", *_time_lines(plan, plan.estimate)]
        lines += ["", *_collective_lines(plan.estimate), "", *_operation_lines(plan.estimate)]
    lines += [f"warning: {line}" for line in plan.warnings]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = [
        ("parameters", memory.params),
        ("optimizer", memory.optimizer),
        ("EMA", memory.ema),
        ("batch", memory.batch),
        ("activations", memory.activations),
        ("program", memory.program),
        ("used", memory.used),
        ("available", memory.available),
    ]
    lines = [f"{'memory of each chip':<28}{'GiB':>16}"]
    lines += [f"  {name:<26}{value / _GIB:>16.3f}" for name, value in rows]
    if memory.fits:
        return [*lines, f"it fits, with {memory.left / _GIB:.2f} GiB left"]
    lines.append(f"it does NOT fit: {-memory.left / _GIB:.2f} GiB too much on each chip. What would help:")
    return lines + [f"  {line}" for line in plan.suggestions]


def _time_lines(plan: Plan, found: Estimate) -> list[str]:
    rows = [
        ("compiler's estimates", found.compiler_s),
        ("hand-written kernels", found.kernel_s),
        ("moves without estimate", found.unestimated_s),
        ("collectives not hidden", found.exposed_s),
    ]
    name = "training step" if plan.program is Program.TRAIN else f"batch, {plan.network_steps} steps"
    lines = [f"{'predicted ' + name:<28}{found.seconds * 1e3:>16.2f}  ms"]
    lines += [
        f"  {name:<26}{seconds * 1e3:>16.2f}  ms, {seconds / found.seconds:.1%}" for name, seconds in rows
    ]
    if plan.program is Program.SAMPLE:
        lines.append(f"{'predicted network step':<28}{(plan.step_s or 0) * 1e3:>16.2f}  ms")
    return [
        *lines,
        f"{'predicted pictures a second':<28}{plan.images_per_s or 0:>16,.1f}  on all chips",
        f"{'predicted MFU':<28}{plan.mfu or 0:>16.1%}  of {plan.topology.chip.peak_flops / 1e12:.0f} bf16 TFLOP/s",
    ]


def _collective_lines(found: Estimate) -> list[str]:
    if not found.collectives:
        return ["no collectives"]
    lines = [f"{'collectives of a run':<28}{'received MB':>16}{'times':>8}{'chips':>8}{'ms':>10}"]
    for each in found.collectives:
        lines.append(
            f"  {each.kind.value:<26}{each.received_bytes / 1e6:>16,.2f}{each.count:>8}{each.chips:>8}"
            f"{each.seconds * 1e3:>10.3f}"
        )
    return lines


def _operation_lines(found: Estimate) -> list[str]:
    lines = [f"{'costliest operations':<64}{'ms':>10}{'share':>8}"]
    for origin, seconds in found.operations[:OPERATIONS]:
        name = f"{origin.source} {origin.operation}"
        lines.append(f"  {name:<62}{seconds * 1e3:>10.3f}{seconds / found.seconds:>8.1%}")
    return lines
