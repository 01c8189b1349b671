"""What a stage needs on one NVIDIA GPU, by formula: nothing is compiled, and JAX needs no GPU for it.

Memory is what lies there anyway (state, batch) and the most that the traced program holds at a time, every
intermediate array written: XLA fuses many of them away, so that a stage that is said to fit does. Time is the model
FLOPs at a share of the peak, and the optimizer's passes over its state at the memory's bandwidth.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from imagen_jax.errors import UserError
from imagen_jax.models.network import Attention
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.plan.chips import DEVICE_PEAKS
from imagen_jax.plan.compile import Program, null_text, sampling_program, training_batch
from imagen_jax.plan.flops import forward_flops
from imagen_jax.plan.memory import Memory, account, bytes_per_device
from imagen_jax.sampling.programs import whole_way
from imagen_jax.sizes import Size
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.run import Run
from imagen_jax.training.train_step import batch_gradients

_GIB = 2**30
MEMORY_SHARE = 0.9  # of a GPU's memory that the commands let JAX take (`cli.main`)
# Of the peak, that networks of convolutions reach with XLA on GPUs: an assumption, to be replaced by benchmarks/gpu.sh.
PEAK_SHARES = (0.25, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, by NVIDIA's data sheets; without sparsity."""

    name: str  # as in --device
    peak_flops: float  # FLOP/s in bfloat16; of the T4, which has none, in float32
    peak_flops_32: float  # FLOP/s of float32 arrays: TF32 where there is it
    memory_bytes: int  # as nvidia-smi has it
    bandwidth: float  # bytes/s of its memory

    @property
    def available(self) -> int:
        """Bytes that a program may use."""
        return int(MEMORY_SHARE * self.memory_bytes)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",  # SXM
            peak_flops=DEVICE_PEAKS["NVIDIA H100 80GB HBM3"],
            peak_flops_32=494e12,
            memory_bytes=81_559 * 2**20,
            bandwidth=3350e9,
        ),
        Gpu(
            name="h200",
            peak_flops=DEVICE_PEAKS["NVIDIA H200"],
            peak_flops_32=494e12,
            memory_bytes=143_771 * 2**20,
            bandwidth=4800e9,
        ),
        Gpu(
            name="a100",  # SXM, 80 GB
            peak_flops=DEVICE_PEAKS["NVIDIA A100-SXM4-80GB"],
            peak_flops_32=156e12,
            memory_bytes=81_920 * 2**20,
            bandwidth=2039e9,
        ),
        Gpu(
            name="l4",
            peak_flops=DEVICE_PEAKS["NVIDIA L4"],
            peak_flops_32=60e12,
            memory_bytes=23_034 * 2**20,
            bandwidth=300e9,
        ),
        Gpu(name="t4", peak_flops=8.1e12, peak_flops_32=8.1e12, memory_bytes=15_360 * 2**20, bandwidth=320e9),
        Gpu(
            name="rtx4090",
            peak_flops=DEVICE_PEAKS["NVIDIA GeForce RTX 4090"],
            peak_flops_32=82.6e12,
            memory_bytes=24_564 * 2**20,
            bandwidth=1008e9,
        ),
    )
}


def parse_device(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
      UserError: if there is none, naming --device.
    """
    if name not in GPUS:
        raise UserError(f"--device={name[:80]}: no such GPU; known are {', '.join(GPUS)}")
    return GPUS[name]


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes of results that a traced program holds at a time, run in its order; arguments not counted.

    A program that it calls (of jit, checkpoint, loops) adds its own most while it runs. Kernels add their results.
    """
    last: dict[Any, int] = {}
    for place, equation in enumerate(jaxpr.eqns):
        for variable in equation.invars:
            if not isinstance(variable, Literal):
                last[variable] = place
    for variable in jaxpr.outvars:
        if not isinstance(variable, Literal):
            last[variable] = len(jaxpr.eqns)
    ending: dict[int, int] = {}
    live = most = 0
    for place, equation in enumerate(jaxpr.eqns):
        results = 0
        for variable in equation.outvars:
            result: Any = variable.aval
            size = math.prod(result.shape) * result.dtype.itemsize
            results += size
            end = last.get(variable, place)
            ending[end] = ending.get(end, 0) + size
        inner = 0 if equation.primitive.name == "pallas_call" else _inner_peak(equation.params)
        most = max(most, live + max(results, inner))
        live += results - ending.pop(place, 0)
    return most


def _inner_peak(params: dict[str, Any]) -> int:
    most = 0
    for value in params.values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, ClosedJaxpr):
                most = max(most, peak_bytes(inner.jaxpr))
            elif isinstance(inner, Jaxpr):
                most = max(most, peak_bytes(inner))
    return most


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """What one program of a stage needs on a GPU."""

    stage: str
    program: Program
    gpu: Gpu
    batch_size: int
    params: int  # number of them
    memory: Memory
    flops: float  # of the program, by the network's forward pass
    peak_flops: float  # in the network's dtype
    update_s: float  # the optimizer's passes over its state

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a training step or a batch of pictures, at the higher and the lower share of the peak."""
        low, high = PEAK_SHARES
        return (
            self.flops / (high * self.peak_flops) + self.update_s,
            self.flops / (low * self.peak_flops) + self.update_s,
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers, in bytes and seconds."""
        return {
            "stage": self.stage,
            "program": self.program.value,
            "device": self.gpu.name,
            "batch_size": self.batch_size,
            "params": self.params,
            "fits": self.memory.fits,
            "used_bytes": self.memory.used,
            "available_bytes": self.memory.available,
            "memory_bytes": {
                name: value
                for name, value in dataclasses.asdict(self.memory).items()
                if name not in ("available", "program")
            },
            "program_flops": self.flops,
            "peak_flops": self.peak_flops,
            "formula_run_s": self.seconds,
        }

    def to_text(self) -> str:
        """For people."""
        memory, (fast, slow), (low, high) = self.memory, self.seconds, PEAK_SHARES
        what = "a training step of" if self.program is Program.TRAIN else "sampling"
        rows = [
            ("parameters", memory.params),
            ("optimizer", memory.optimizer),
            ("EMA", memory.ema),
            ("batch", memory.batch),
            ("activations, at most", memory.activations),
            ("used, at most", memory.used),
            ("available", memory.available),
        ]
        lines = [
            f"{self.stage} on one {self.gpu.name}: {what} {self.batch_size} pictures",
            "by formula; nothing was compiled or run",
            "",
            f"{'parameters':<28}{self.params:>16,}",
            f"{'TFLOP':<28}{self.flops / 1e12:>16,.2f}",
            "",
            f"{'memory':<28}{'GiB':>16}",
            *(f"  {name:<26}{value / _GIB:>16.3f}" for name, value in rows),
            f"it fits, with {memory.left / _GIB:.2f} GiB left"
            if memory.fits
            else f"it may NOT fit: {-memory.left / _GIB:.2f} GiB too much; what helps: --batch_size, "
            "--config.train.accumulate, --config.stage.network.remat=block",
            "",
            f"{'predicted ms':<28}{f'{1e3 * fast:.1f} to {1e3 * slow:.1f}':>16}  at {high:.0%} to {low:.0%} of "
            f"{self.peak_flops / 1e12:.0f} TFLOP/s",
        ]
        return "\n".join(lines)


def make_gpu_plan(config: TrainConfig, gpu: Gpu, program: Program) -> GpuPlan:
    """Reckons what a stage needs on one GPU.

    Args:
      config: the stage and its batch size.
      gpu: which.
      program: what of the stage.

    Raises:
      UserError: for a network that cannot be trained.
    """
    config = dataclasses.replace(config, mesh=MeshConfig())
    train, stage = program is Program.TRAIN, config.stage
    half = stage.network.dtype == "bfloat16"
    if train:
        config.check_trainable()
    # Our kernel keeps what cuDNN's keeps: no logits.
    kinds = (Attention.FLASH, Attention.XLA) if half else (Attention.XLA,)
    config, per_image = _counted(config, kinds, config.step_size if train else config.size)
    state, inputs, most = _training(config) if train else _sampling(config)
    guided = 1 if stage.sampling.guidance_weight == 1.0 else 2
    calls = 3 if train else stage.sampling.sampler.network_calls * guided
    network = StageNetwork(config.stage)
    memory = account(
        state,
        inputs,
        total=bytes_per_device((state, inputs)) + most,
        program=0,
        prefetched=train,
        available=gpu.available,
    )
    return GpuPlan(
        stage=stage.name,
        program=program,
        gpu=gpu,
        batch_size=config.data.batch_size,
        params=network.parameter_count(),
        memory=memory,
        flops=float(per_image) * calls * config.data.batch_size,
        peak_flops=gpu.peak_flops if half else gpu.peak_flops_32,
        # State is read and written, gradients are read.
        update_s=(2 * (memory.params + memory.optimizer + memory.ema) + memory.params) / gpu.bandwidth
        if train
        else 0.0,
    )


def _counted(config: TrainConfig, kinds: tuple[Attention, ...], size: Size) -> tuple[TrainConfig, int]:
    """The config with the first of the attentions that takes the network's shapes, and its forward FLOPs a picture."""
    for kind in kinds:
        network = dataclasses.replace(config.stage.network, attention=kind)
        changed = dataclasses.replace(config, stage=dataclasses.replace(config.stage, network=network))
        try:
            return changed, forward_flops(StageNetwork(changed.stage), size=size)
        except ValueError:
            if kind is Attention.XLA:
                raise
    raise AssertionError("plain attention takes all shapes")


def _training(config: TrainConfig) -> tuple[Any, Any, int]:
    """State, batch and the most bytes of a step's results."""
    run = Run.of(config, make_mesh(config.mesh, jax.devices()[:1]))
    state, batch = run.abstract, training_batch(config, run.mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(lambda *given: batch_gradients(run, *given))(
        state.params, batch, null_text(config, run.mesh), step
    )
    return state, batch, peak_bytes(traced.jaxpr)


def _sampling(config: TrainConfig) -> tuple[Any, Any, int]:
    """Parameters, inputs and the most bytes of a batch's results."""
    network = StageNetwork(config.stage)
    spec, params, inputs = sampling_program(config, network, make_mesh(config.mesh, jax.devices()[:1]))
    return params, inputs, peak_bytes(jax.make_jaxpr(whole_way(spec, network))(params, inputs).jaxpr)
