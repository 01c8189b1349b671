"""What to change about a program that does not fit, computed from what it needs."""

import dataclasses
from typing import Any

from imagen_jax.models.network import Remat
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.plan.chips import CHIPS, Topology
from imagen_jax.plan.compile import Compiled, Program
from imagen_jax.plan.memory import Memory, bytes_per_device
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.run import Run

_GIB = 2**30


def _state_bytes(run: Run, compiled: Compiled, program: Program, fsdp: int) -> int:
    """Bytes on each device of everything that grows with the parameters, split over `fsdp` devices."""
    tensor = compiled.mesh.shape["tensor"]
    mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor), list(compiled.mesh.devices.flat))
    state = run.on(mesh).abstract
    if program is Program.SAMPLE:
        return bytes_per_device(state.params)
    # The gradients lie as the parameters do, and are a part of the activations.
    return bytes_per_device(state) + bytes_per_device(state.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Needs:
    """How much memory other settings would need, by proportion."""

    run: Run
    compiled: Compiled
    program: Program
    memory: Memory

    @property
    def fsdp(self) -> int:
        return self.compiled.mesh.shape["fsdp"]

    @property
    def parts(self) -> int:
        """Devices that share a batch."""
        return self.compiled.mesh.shape["data"] * self.fsdp

    @property
    def per_part(self) -> int:
        """Pictures of each of them."""
        return self.run.config.data.batch_size // self.parts

    def state(self, fsdp: int) -> int:
        return _state_bytes(self.run, self.compiled, self.program, fsdp)

    def pictures(self) -> int:
        """Bytes that grow with the pictures of a device."""
        return max(0, self.memory.used - self.memory.program - self.state(self.fsdp))

    def total(self, state: int, per_part: int) -> float:
        """Bytes with that much state and so many pictures a device."""
        return self.memory.program + state + self.pictures() * per_part / self.per_part

    def largest_batch(self, state: int) -> int:
        """Pictures a device that fit beside that much state; 0: none."""
        room = self.memory.available - self.memory.program - state
        return min(self.per_part, max(0, int(room * self.per_part // max(1, self.pictures()))))


def suggestions(
    config: TrainConfig, topology: Topology, compiled: Compiled, program: Program, memory: Memory
) -> list[str]:
    """One line for each change that would make it fit, the one that costs least first.

    The bytes are by proportion: what grows with the parameters shrinks with fsdp, the rest with the batch.
    """
    needs = _Needs(run=Run.of(config, compiled.mesh), compiled=compiled, program=program, memory=memory)
    lines = []
    if program is Program.TRAIN and config.stage.network.remat is not Remat.BLOCK:
        stronger = "products" if config.stage.network.remat is Remat.NONE else "block"
        lines.append(
            f"--config.stage.network.remat={stronger}: keeps less of each block for the backward pass, of the "
            f"{memory.activations / _GIB:.1f} GiB of activations"
        )
    spread = _more_fsdp(needs, topology)
    if spread is not None:
        lines.append(spread)
    smaller = needs.largest_batch(needs.state(needs.fsdp))
    if 0 < smaller < needs.per_part:
        lines.append(_batch_line(needs, smaller, needs.state(needs.fsdp), ""))
    if spread is None and smaller == 0:
        widest = topology.count // compiled.mesh.shape["tensor"]
        state = needs.state(widest)
        both = needs.largest_batch(state)
        if both:
            lines.append(
                _batch_line(needs, both, state, f"--config.mesh.fsdp={widest} --config.mesh.data=1 ")
            )
    larger = [
        chip
        for chip in CHIPS.values()
        if chip.hbm_bytes >= memory.used and chip.hbm_bytes > topology.chip.hbm_bytes
    ]
    lines += [
        f"--topology={chip.name}:…: {chip.hbm_bytes / _GIB:.1f} GiB a chip for the same mesh and batch"
        for chip in sorted(larger, key=lambda chip: chip.hbm_bytes)
    ]
    return lines or [
        "no change of mesh, batch or chip alone makes it fit: take more chips or a smaller network"
    ]


def _more_fsdp(needs: _Needs, topology: Topology) -> str | None:
    """The smallest fsdp at which the state leaves enough room, as a line."""
    devices = topology.count // needs.compiled.mesh.shape["tensor"]
    for fsdp in range(needs.fsdp + 1, devices + 1):
        if devices % fsdp == 0:
            need = needs.total(needs.state(fsdp), needs.per_part)
            if need <= needs.memory.available:
                return (
                    f"--config.mesh.fsdp={fsdp} --config.mesh.data={devices // fsdp}: "
                    f"about {need / _GIB:.1f} GiB a chip"
                )
    return None


def _batch_line(needs: _Needs, per_part: int, state: int, flags: str) -> str:
    total: Any = needs.total(state, per_part) / _GIB
    return f"{flags}--batch_size={per_part * needs.parts}: {per_part} pictures a device, about {total:.1f} GiB a chip"
