"""What collectives move between chips, and how long the interconnect needs for it."""

import dataclasses
import enum
import itertools
import re
from collections.abc import Sequence

import numpy as np

from imagen_jax.plan.chips import Topology
from imagen_jax.plan.hlo import Instruction


class Collective(enum.StrEnum):
    """Kinds of communication, by XLA's names."""

    ALL_GATHER = "all-gather"
    ALL_REDUCE = "all-reduce"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"
    RAGGED_ALL_TO_ALL = "ragged-all-to-all"
    PERMUTE = "collective-permute"
    BROADCAST = "collective-broadcast"
    BETWEEN_SLICES = (
        "between slices"  # no name of XLA's: a transfer by the hosts, over the data centre's network
    )


Groups = tuple[tuple[int, ...], ...]

LINK_SHARE = 0.95  # of a link's published bandwidth was measured; see `plan.chips`
HOP_SECONDS = 1e-6  # from a chip to its neighbour, whatever the size (jax-ml.github.io/scaling-book)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One collective as one chip sees it."""

    kind: Collective
    received_bytes: int  # that each chip has to receive
    groups: Groups  # chips that take part together, by their place in the mesh


def collective_kind(opcode: str) -> Collective | None:
    """The kind of a collective's opcode, its "-start" included; None for other instructions."""
    name = opcode.removesuffix("-start")
    return Collective(name) if name in set(Collective) - {Collective.BETWEEN_SLICES} else None


def received_bytes(kind: Collective, input_bytes: int, size: int) -> int:
    """Bytes that a chip has to receive, at least, in a group of `size` chips with `input_bytes` on each.

    An all-reduce is a reduce-scatter and an all-gather; in each, everything but a chip's own part arrives once.
    """
    match kind:
        case Collective.ALL_GATHER:
            return input_bytes * (size - 1)
        case Collective.ALL_REDUCE:
            return 2 * input_bytes * (size - 1) // size
        case Collective.REDUCE_SCATTER | Collective.ALL_TO_ALL | Collective.RAGGED_ALL_TO_ALL:
            return input_bytes * (size - 1) // size
        case Collective.PERMUTE | Collective.BROADCAST | Collective.BETWEEN_SLICES:
            return input_bytes


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """All ids in the order of XLA's "[a,b]T(1,0)": counted row by row, then transposed and flattened."""
    ids = np.arange(np.prod(_integers(shape))).reshape(_integers(shape))
    return (ids.transpose(_integers(order)) if order else ids).reshape(-1)


def _mesh_groups(sizes: str, device_ids: re.Match[str] | None, axes: str) -> Groups:
    """Groups of "mesh['a'=2,'b'=4] {'b'}": one for each place along the axes that are not named.

    An axis may be named in part, as 'b':(2)2: of its 4 places the 2 that follow after the 2 before.
    """
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    shape, used = [], []
    for name, length in names:
        parts = {1, int(length)}
        for other, before, size in chosen:
            if other == name and before:
                parts |= {int(before), int(before) * int(size)}
        cuts = sorted(parts)
        for low, high in itertools.pairwise(cuts):
            taken = any(
                other == name and (not before or int(before) <= low < int(before) * int(size))
                for other, before, size in chosen
            )
            used.append(taken)
            shape.append(high // low)
    count = int(np.prod(shape))
    ids = _iota(device_ids.group(1), device_ids.group(2)) if device_ids else np.arange(count)
    order = [i for i, taken in enumerate(used) if not taken] + [i for i, taken in enumerate(used) if taken]
    size = int(np.prod([length for length, taken in zip(shape, used) if taken]))
    return _rows(ids.reshape(shape).transpose(order).reshape(-1, size))


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(each) for each in row) for row in ids)


def parse_groups(attributes: str, count: int) -> Groups:
    """Which chips of `count` communicate, from `replica_groups` or `source_target_pairs`.

    Raises:
      ValueError: for a notation that is not known.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes)
    if mesh:
        device_ids = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh.group(2))
        return _mesh_groups(mesh.group(1), device_ids, mesh.group(3))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        groups = tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))
        return groups or (tuple(range(count)),)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        order = _iota(iota.group(3), iota.group(4))
        return _rows(order.reshape(int(iota.group(1)), int(iota.group(2))))
    raise ValueError(f"groups of a collective in an unknown notation: {attributes[:200]!r}")


def transfer(instruction: Instruction, input_bytes: int, count: int, *, scattered: bool = False) -> Transfer:
    """What a collective moves.

    Args:
      instruction: the collective or its start.
      input_bytes: bytes of its operands on each chip.
      count: chips in all.
      scattered: an all-reduce of which each chip keeps its part only, which libtpu runs as a reduce-scatter.
    """
    kind = collective_kind(instruction.opcode)
    if kind is None:
        raise ValueError(f"{instruction.opcode} is no collective")
    if scattered and kind is Collective.ALL_REDUCE:
        kind = Collective.REDUCE_SCATTER
    groups = parse_groups(instruction.attributes, count)
    size = max(len(group) for group in groups) if groups else 1
    return Transfer(kind=kind, received_bytes=received_bytes(kind, input_bytes, size), groups=groups)


_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')


def rendezvous(instruction: Instruction) -> str | None:
    """The name by which a send between slices and its recv know each other; None for other instructions."""
    if instruction.opcode not in ("send", "recv") or not _BETWEEN.search(instruction.attributes):
        return None
    match = _RENDEZVOUS.search(instruction.attributes)
    return match.group(1) if match else None


def slice_transfer(instruction: Instruction, sent_bytes: int, slices: int) -> Transfer:
    """What a chip moves to and from the other slices, whose chips at its place bring as much.

    Args:
      instruction: the send.
      sent_bytes: of the array that is handed to the host.
      slices: number of them.

    Raises:
      ValueError: for a kind of transfer that is not known.
    """
    match = _BETWEEN.search(instruction.attributes)
    name = match.group(1) if match else ""
    kinds = {
        "ALL_REDUCE": Collective.ALL_REDUCE,
        "REDUCE_SCATTER": Collective.REDUCE_SCATTER,
        "ALL_GATHER": Collective.ALL_GATHER,
        "ALL_TO_ALL": Collective.ALL_TO_ALL,
        "ONE_TO_ONE": Collective.PERMUTE,
    }
    if name not in kinds:
        raise ValueError(f"a transfer between slices of an unknown kind: {name!r}")
    moved = received_bytes(kinds[name], sent_bytes, slices)
    return Transfer(kind=Collective.BETWEEN_SLICES, received_bytes=moved, groups=(tuple(range(slices)),))


class Network:
    """The interconnect of a slice, whose chips have the places of a mesh, and what connects it to other slices."""

    def __init__(self, topology: Topology, coordinates: Sequence[Sequence[int]]):
        """Makes it of the chips' coordinates in the slice, in the order of the mesh."""
        self.topology = topology
        self._coordinates = [tuple(each) for each in coordinates]

    @property
    def count(self) -> int:
        """Number of chips in the mesh."""
        return len(self._coordinates)

    def bandwidth(self, group: Sequence[int]) -> float:
        """Bytes/s that each chip can receive from the others of its group.

        Along each axis of the grid on which the group's chips differ, both links of a ring bring data; on a line
        the chips at its ends have one link, and all wait for them.
        """
        links = 0
        for axis, size in enumerate(self.topology.sizes):
            places = {self._coordinates[chip][axis] for chip in group}
            if len(places) > 1:
                links += 2 if len(places) == size and self.topology.wraps(axis) else 1
        return max(links, 1) * LINK_SHARE * self.topology.chip.link_bandwidth

    def hops(self, group: Sequence[int]) -> int:
        """From chip to chip, that what the farthest of a group sends takes to arrive."""
        hops = 0
        for axis, size in enumerate(self.topology.sizes):
            places = {self._coordinates[chip][axis] for chip in group}
            ways = {abs(a - b) for a, b in itertools.combinations(places, 2)}
            hops += max(
                (min(way, size - way) if self.topology.wraps(axis) else way for way in ways), default=0
            )
        return hops

    def seconds(self, moved: Transfer) -> float:
        """How long a collective takes that has the links to itself: its bytes and the way of the first of them."""
        if not moved.groups or moved.received_bytes == 0:
            return 0.0
        if moved.kind is Collective.BETWEEN_SLICES:
            assert self.topology.chip.network_bandwidth is not None  # by parse_topology
            return moved.received_bytes / self.topology.chip.network_bandwidth
        turns = 2 if moved.kind is Collective.ALL_REDUCE else 1
        groups = set(moved.groups)
        slowest = moved.received_bytes / min(self.bandwidth(group) for group in groups)
        return slowest + turns * HOP_SECONDS * max(self.hops(group) for group in groups)
