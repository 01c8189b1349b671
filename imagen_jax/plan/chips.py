"""The TPU chips that can be planned for: published peak numbers, and what the compiler's cycles mean on each.

Sources: the Cloud TPU documentation's page of each chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) for
bfloat16 peak and HBM bandwidth. Links: one way as "How to Scale Your Model" lists them (jax-ml.github.io/scaling-book,
the chapter on TPUs), a tenth below the 400 GB/s and so on of the documentation's pages; that book measured 95 % of it.

The clock that turns the compiler's `estimated_cycles` into seconds is not on those pages. It is taken from
consistency: libtpu 0.0.51 estimates a 4096³ … 32768³ bfloat16 product at 115,000–127,000 FLOPs a cycle on v5e,
236,000–252,000 on v5p, 230,000–253,000 on v4 (two cores as one device) and 369,000–456,000 on v6e: just below
2^17, 2^18, 2^18 and 2^19, the FLOPs that the matrix units do in a cycle. The published peak over that power of two
is the clock: 1.503, 1.751, 1.049 and 1.751 GHz. With it, adding a constant to a float32 array of 1 GiB reaches
660, 1985, 945 and 1325 GB/s, 72–81 % of each chip's HBM bandwidth, so the same clock holds for memory.

Between slices: a host's network cards over its chips, as the pages have it: v5e 200 Gbit/s and v6e 800 for 8 chips, v5p
50 Gbit/s a chip. The page of v4 does not say.

What the matrix units do in a cycle of the attention kernels is counted in libtpu's final schedule of them
(`benchmarks/schedule.py`): heads of 64 channels fill half of a unit, and exponentials take turns with it. The same
count says how far the compiler's estimates of ResNet blocks fall short of what it then schedules: nowhere but on v6e.
"""

import dataclasses
import enum
import math

from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_DEVICES, is_count, shown

_GIB = 2**30


class Wrap(enum.Enum):
    """Along which axes of a slice the interconnect closes to a ring."""

    FULL_POD = "full pod"  # 2-D: an axis of all 16 chips
    CUBES = "cubes"  # 3-D: all axes of a slice that is made of 4×4×4 cubes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU chip, which is one JAX device."""

    name: str  # as in --topology
    peak_flops: float  # FLOP/s in bfloat16
    flops_per_cycle: int  # bfloat16, of the clock of `estimated_cycles`; see the module's text
    hbm_bytes: int  # bytes that a program may use: what libtpu 0.0.51 calls available, its reserve taken off
    hbm_bandwidth: float  # bytes/s
    kernel_flops_per_cycle: int  # of the attention kernels with heads of 64 channels; see the module's text
    scheduled_share: float = 1.0  # cycles that the compiler schedules, over those that it estimates
    link_bandwidth: float  # bytes/s of one interconnect link in one direction
    axes: int  # of the interconnect's grid; two links each
    wrap: Wrap
    tensor_cores: int  # of a chip; they work as one device
    network_bandwidth: float | None = None  # bytes/s between slices, a chip's share; None: not published
    config_name: str  # libtpu's chip_config_name that makes one device of a chip

    @property
    def clock_hz(self) -> float:
        """Cycles a second of the compiler's estimates."""
        return self.peak_flops / self.flops_per_cycle


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            peak_flops=275e12,
            flops_per_cycle=2**18,
            hbm_bytes=int(30.75 * _GIB),
            hbm_bandwidth=1200e9,
            kernel_flops_per_cycle=58_000,
            link_bandwidth=45e9,
            axes=3,
            wrap=Wrap.CUBES,
            tensor_cores=2,
            config_name="megacore",
        ),
        Chip(
            name="v5e",
            peak_flops=197e12,
            flops_per_cycle=2**17,
            hbm_bytes=int(15.75 * _GIB),
            hbm_bandwidth=819e9,
            kernel_flops_per_cycle=39_000,
            link_bandwidth=45e9,
            axes=2,
            wrap=Wrap.FULL_POD,
            tensor_cores=1,
            network_bandwidth=3.125e9,
            config_name="default",
        ),
        Chip(
            name="v5p",
            peak_flops=459e12,
            flops_per_cycle=2**18,
            hbm_bytes=int(95.73 * _GIB),
            hbm_bandwidth=2765e9,
            kernel_flops_per_cycle=73_000,
            link_bandwidth=90e9,
            axes=3,
            wrap=Wrap.CUBES,
            tensor_cores=2,
            network_bandwidth=6.25e9,
            config_name="megacore",
        ),
        Chip(
            name="v6e",
            peak_flops=918e12,
            flops_per_cycle=2**19,
            hbm_bytes=int(31.24 * _GIB),
            hbm_bandwidth=1638e9,
            kernel_flops_per_cycle=48_000,
            scheduled_share=1.1,
            link_bandwidth=90e9,
            axes=2,
            wrap=Wrap.FULL_POD,
            tensor_cores=1,
            network_bandwidth=12.5e9,
            config_name="default",
        ),
    )
}


# Peak FLOP/s in bfloat16 by what JAX calls a device (`device_kind`). GPUs: NVIDIA's data sheets (of the RTX 4090: the
# white paper of its architecture, with sums in float32), without sparsity. T4 has no bfloat16: its peak in float16.
DEVICE_PEAKS = {
    "TPU v4": CHIPS["v4"].peak_flops,
    "TPU v5 lite": CHIPS["v5e"].peak_flops,
    "TPU v5e": CHIPS["v5e"].peak_flops,
    "TPU v5": CHIPS["v5p"].peak_flops,
    "TPU v5p": CHIPS["v5p"].peak_flops,
    "TPU v6 lite": CHIPS["v6e"].peak_flops,
    "TPU v6e": CHIPS["v6e"].peak_flops,
    "TPU7x": 2307e12 / 2,  # a device is one of the chip's two cores
    "Tesla T4": 65e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def device_peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a device that JAX runs on; None if it is not known here."""
    return DEVICE_PEAKS.get(device_kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice: a grid of equal chips; or several equal ones that the data centre's network connects."""

    chip: Chip
    sizes: tuple[int, ...]  # chips along each axis of a slice
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """Of one slice, such as "v5e:16x16"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def name(self) -> str:
        """Such as "v5e:16x16", or "2 slices of v5e:16x16"."""
        return self.slice_name if self.slices == 1 else f"{self.slices} slices of {self.slice_name}"

    @property
    def count(self) -> int:
        """Number of chips, of all slices."""
        return self.slices * math.prod(self.sizes)

    def wraps(self, axis: int) -> bool:
        """Whether the chips along an axis form a ring."""
        if self.chip.wrap is Wrap.CUBES:
            return all(size % 4 == 0 for size in self.sizes)
        return self.sizes[axis] == 16


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A slice by its name: the chip, a colon and the chips along each axis, such as "v5p:4x4x8".

    Args:
      text: the name.
      slices: number of such slices.

    Raises:
      UserError: for an unknown chip or a shape that is none of its own, naming --topology; for a number of slices that
        cannot be planned, naming --slices.
    """
    if slices < 1:
        raise UserError(f"--slices={shown(slices)}: must be at least 1")
    name, _, shape = text.partition(":")
    known, text = ", ".join(CHIPS), text[:80]
    chip = CHIPS.get(name)
    if chip is None:
        raise UserError(
            f"--topology={text}: no chip {name!r}; known are {known}, as in v5e:16x16 or v5p:4x4x8"
        )
    example = "x".join(["4"] * chip.axes)
    parts = shape.split("x")
    if not all(is_count(part) and int(part) > 0 for part in parts) or len(parts) != chip.axes:
        raise UserError(
            f"--topology={text}: a slice of {name} has {chip.axes} axes of chips, as in {name}:{example}"
        )
    topology = Topology(chip=chip, sizes=tuple(int(part) for part in parts), slices=slices)
    if topology.count > MAX_DEVICES:
        raise UserError(
            f"--topology={text}: {topology.count} chips; there is no slice of more than {MAX_DEVICES}"
            if slices == 1
            else f"--slices={shown(slices)}: {shown(topology.count)} chips; at most {MAX_DEVICES} can be planned"
        )
    if slices > 1 and chip.network_bandwidth is None:
        raise UserError(
            f"--slices={slices}: what the network between slices of {name} carries is not published"
        )
    return topology
