"""Predicts how long a compiled TPU program takes, from the compiler's own estimate of each instruction.

The compiler puts `estimated_cycles` on every fusion, copy and reduction of a scheduled program. Added up in that
order, a while body times its trip count and a conditional at its costlier branch, they are the time of the
arithmetic. What carries no estimate is added: hand-written kernels by their own count of work, other instructions
that move data at HBM bandwidth, and of each collective the part that nothing was scheduled to hide.
"""

import dataclasses
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from imagen_jax.plan.chips import Topology
from imagen_jax.plan.hlo import Instruction, Module, shape_bytes
from imagen_jax.plan.network import (
    Collective,
    Network,
    Transfer,
    collective_kind,
    rendezvous,
    slice_transfer,
    transfer,
)

# A hand-written kernel is taken to reach this share of HBM bandwidth; its arithmetic is `Chip.kernel_flops_per_cycle`.
KERNEL_BANDWIDTH = 0.6
KERNEL_TARGET = "tpu_custom_call"
# What takes no time, or is done by the DMA engines beside the arithmetic.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"),
    *("partition-id", "replica-id", "add-dependency", "async-update"),
    *("copy-start", "copy-done", "slice-start", "slice-done"),
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "Sharding"}
# libtpu splits a collective into fusions that call these; the work between them runs beside it.
_SPLIT_START, _SPLIT_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an operation comes from."""

    source: str  # innermost line of this package on its call stack, "imagen_jax/models/layers.py:85"
    operation: str  # JAX's name and the pass, "dot_general, backward"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveTotal:
    """All collectives of one kind among groups of one size."""

    kind: Collective
    chips: int  # of a group
    count: int  # how often one runs
    received_bytes: int  # by each chip, in all
    seconds: float  # of the interconnect, hidden or not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted times of one run of a program on each chip, in seconds."""

    seconds: float  # in all: the sum of the four below
    compiler_s: float  # instructions that the compiler estimated
    kernel_s: float  # hand-written kernels, by their own count of FLOPs and bytes
    unestimated_s: float  # other instructions that move data, at HBM bandwidth
    exposed_s: float  # waiting for collectives
    collectives: tuple[CollectiveTotal, ...]  # most bytes first
    operations: tuple[tuple[Origin, float], ...]  # seconds by origin, costliest first
    unknown_loops: tuple[str, ...]  # loops whose iterations are unknown; counted once


@dataclasses.dataclass
class _Cost:
    """What a computation takes."""

    compiler: float = 0.0
    kernel: float = 0.0
    unestimated: float = 0.0
    exposed: float = 0.0
    origins: dict[Origin, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    transfers: dict[Transfer, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    unknown_loops: set[str] = dataclasses.field(default_factory=set)

    @property
    def seconds(self) -> float:
        return self.compiler + self.kernel + self.unestimated + self.exposed

    def add(self, other: "_Cost", times: int = 1) -> None:
        self.compiler += times * other.compiler
        self.kernel += times * other.kernel
        self.unestimated += times * other.unestimated
        self.exposed += times * other.exposed
        for origin, seconds in other.origins.items():
            self.origins[origin] += times * seconds
        for moved, count in other.transfers.items():
            self.transfers[moved] += times * count
        self.unknown_loops |= other.unknown_loops


class _Links:
    """The interconnect while a computation runs: collectives one after the other, beside the arithmetic.

    What goes to other slices goes by the hosts, beside both.
    """

    def __init__(self, cost: _Cost, network: Network):
        self._cost, self._network = cost, network
        self._free_at = {False: 0.0, True: 0.0}  # by whether it is between slices
        self._running: dict[str, deque[tuple[float, Origin]]] = defaultdict(deque)
        self._met: dict[str, str] = {}

    def start(self, key: str, moved: Transfer, origin: Origin) -> None:
        """Queues a collective."""
        between = moved.kind is Collective.BETWEEN_SLICES
        end = max(self._free_at[between], self._cost.seconds) + self._network.seconds(moved)
        self._free_at[between] = end
        self._running[key].append((end, origin))
        self._cost.transfers[moved] += 1

    def meet(self, name: str, key: str) -> None:
        """Says that who waits for `name` waits for the collective `key`."""
        self._met[name] = key

    def wait(self, key: str) -> None:
        """Goes on when the oldest collective of that name has ended."""
        key = self._met.get(key, key)
        if not self._running[key]:
            return
        end, origin = self._running[key].popleft()
        waited = max(0.0, end - self._cost.seconds)
        self._cost.exposed += waited
        self._cost.origins[origin] += waited

    def wait_for_all(self) -> None:
        """Goes on when none is left."""
        for key in list(self._running):
            while self._running[key]:
                self.wait(key)


class Estimator:
    """Walks a program."""

    def __init__(self, module: Module, network: Network):
        self._module, self._network = module, network
        self._chip = network.topology.chip
        self._done: dict[str, _Cost] = {}

    def cost(self, name: str) -> _Cost:
        """The cost of one run of a computation."""
        if name not in self._done:
            self._done[name] = self._walk(name)
        return self._done[name]

    def _walk(self, name: str) -> _Cost:
        cost = _Cost()
        links = _Links(cost, self._network)
        instructions = self._module.computations[name]
        shapes = {each.name: each.shape for each in instructions}
        for each in instructions:
            if each.opcode == "while":
                count = self._module.loop_count(each, instructions)
                if count is None:
                    cost.unknown_loops.add(each.name)
                cost.add(self.cost(each.called[0]), 1 if count is None else count)
            elif each.opcode == "conditional":
                cost.add(max((self.cost(branch) for branch in each.branches), key=lambda c: c.seconds))
            elif each.opcode == "call":
                cost.add(self.cost(each.called[0]))
            elif not self._communicate(each, shapes, links):
                self._work(each, shapes, cost)
        links.wait_for_all()
        return cost

    def _between_slices(self, each: Instruction, shapes: dict[str, str], links: _Links) -> bool:
        """Starts what is sent to other slices, or says which send a recv waits for; False for all others."""
        key = rendezvous(each)
        if key is None:
            return False
        if each.opcode == "send":
            sent = shape_bytes(shapes[each.operands[0]])
            moved = slice_transfer(each, sent, self._network.topology.slices)
            links.start(key, moved, self.origin(each, each.opcode))
        else:
            links.meet(each.name, key)
        return True

    def _communicate(self, each: Instruction, shapes: dict[str, str], links: _Links) -> bool:
        """Runs an instruction that is a collective or a part of one; False for all others."""
        if each.opcode.endswith("-done"):
            links.wait(each.operands[0])
            return True
        if self._between_slices(each, shapes, links):
            return True
        if collective_kind(each.opcode):
            links.start(each.name, self._transfer(each, shapes), self.origin(each, each.opcode))
            if not each.opcode.endswith("-start"):
                links.wait(each.name)
            return True
        if each.opcode not in ("fusion", "async-start") or each.cycles is not None:
            return False
        inner = [part for name in each.called for part in self._module.computations[name]]
        moved = next((part for part in inner if collective_kind(part.opcode)), None)
        if moved is None:
            return each.opcode == "async-start"  # a copy
        targets = {part.target for part in inner}
        key = each.name if each.opcode == "async-start" else moved.attributes.partition(", replica_groups")[0]
        if _SPLIT_DONE not in targets:
            local = {part.name: part.shape for part in inner}
            scattered = each.called[0].startswith("all-reduce-scatter")
            found = self._transfer(moved, local, scattered=scattered)
            links.start(key, found, self.origin(each, moved.opcode))
        if _SPLIT_START not in targets and each.opcode == "fusion":
            links.wait(key)
        return True

    def _transfer(self, each: Instruction, shapes: dict[str, str], *, scattered: bool = False) -> Transfer:
        size = sum(shape_bytes(shapes[operand]) for operand in each.operands)
        return transfer(each, size, self._network.count, scattered=scattered)

    def _work(self, each: Instruction, shapes: dict[str, str], cost: _Cost) -> None:
        """Adds an instruction that computes or moves data within the chip."""
        if each.cycles is not None:
            seconds = self._chip.scheduled_share * each.cycles / self._chip.clock_hz
            cost.compiler += seconds
        elif each.opcode in _FREE or each.target in _FREE_TARGETS:
            return
        elif each.target == KERNEL_TARGET:
            seconds = self._kernel_seconds(each, shapes)
            cost.kernel += seconds
        else:
            seconds = self._moved_bytes(each, shapes) / self._chip.hbm_bandwidth
            cost.unestimated += seconds
        if seconds:
            cost.origins[self.origin(each, each.opcode)] += seconds

    def _kernel_seconds(self, kernel: Instruction, shapes: dict[str, str]) -> float:
        """What a kernel needs by its own cost_estimate or else by its arrays."""
        known = kernel.kernel_cost or {"bytes_accessed": self._moved_bytes(kernel, shapes)}
        cycles = known.get("flops", 0) / self._chip.kernel_flops_per_cycle
        moved = known.get("bytes_accessed", 0) / (KERNEL_BANDWIDTH * self._chip.hbm_bandwidth)
        return max(cycles / self._chip.clock_hz, moved)

    def _moved_bytes(self, each: Instruction, shapes: dict[str, str]) -> int:
        arrays = [each.shape, *(shapes[operand] for operand in each.operands if operand in shapes)]
        return sum(shape_bytes(shape, hbm_only=True) for shape in arrays)

    def origin(self, each: Instruction, opcode: str) -> Origin:
        """The origin of an instruction; of a fusion without its own, that of what it calculates."""
        described = each
        if not each.op_name and each.opcode == "fusion":
            inner = [part for name in each.called for part in self._module.computations[name]]
            described = next((part for part in reversed(inner) if part.op_name), each)
        frames = list(self._module.stack(described))
        own = next((frame for frame in frames if "imagen_jax/" in frame.file), next(iter(frames), None))
        if own is None:
            source = (
                described.op_name if described.op_name and "/" not in described.op_name else "the compiler"
            )
        else:
            file = own.file
            if "imagen_jax/" in file:
                file = "imagen_jax/" + file.rpartition("imagen_jax/")[2]
            source = f"{file}:{own.line}"
        operation = opcode if collective_kind(opcode) else described.op_name.rpartition("/")[2] or opcode
        return Origin(source, f"{operation}{_which_pass(described.op_name)}")


def _which_pass(op_name: str) -> str:
    """JAX names what it traces for a gradient jvp(), and what is the gradient's transpose(jvp())."""
    if "rematted_computation" in op_name:
        return ", recomputed"
    if "transpose(" in op_name:
        return ", backward"
    return ", forward" if "jvp(" in op_name else ""


def _collective_totals(cost: _Cost, network: Network) -> tuple[CollectiveTotal, ...]:
    alike: dict[tuple[Collective, int], list[tuple[Transfer, int]]] = defaultdict(list)
    for moved, count in cost.transfers.items():
        alike[moved.kind, max((len(group) for group in moved.groups), default=1)].append((moved, count))
    totals = (
        CollectiveTotal(
            kind=kind,
            chips=size,
            count=sum(count for _, count in found),
            received_bytes=sum(count * moved.received_bytes for moved, count in found),
            seconds=sum(count * network.seconds(moved) for moved, count in found),
        )
        for (kind, size), found in alike.items()
    )
    return tuple(sorted(totals, key=lambda total: -total.received_bytes))


def estimate_text(text: str, network: Network) -> Estimate:
    """The prediction for a program's text, as `compiled.as_text()` gives it.

    Args:
      text: of a program that was compiled for the network's chips.
      network: the chips that run it.

    Raises:
      ValueError: if it is not the text of a compiled program.
    """
    module = Module(text)
    cost = Estimator(module, network).cost(module.entry)
    return Estimate(
        seconds=cost.seconds,
        compiler_s=cost.compiler,
        kernel_s=cost.kernel,
        unestimated_s=cost.unestimated,
        exposed_s=cost.exposed,
        collectives=_collective_totals(cost, network),
        operations=tuple(sorted(cost.origins.items(), key=lambda item: -item[1])),
        unknown_loops=tuple(sorted(cost.unknown_loops)),
    )


def estimate(compiled: Any, topology: Topology, devices: Iterable[Any]) -> Estimate:
    """The prediction for a program that `jax.jit(…).lower(…).compile()` made for a slice, or for several.

    Args:
      compiled: the program; all slices run the same, whose groups are of one slice's chips.
      topology: the slice.
      devices: those of the mesh it was compiled for, in its order (`mesh.devices.flat`).
    """
    members = list(devices)
    if topology.slices > 1:
        members = [device for device in members if device.slice_index == members[0].slice_index]
    return estimate_text(compiled.as_text(), Network(topology, [device.coords for device in members]))
