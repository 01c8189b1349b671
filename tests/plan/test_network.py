import itertools

import numpy as np
import pytest

from imagen_jax.plan.chips import parse_topology
from imagen_jax.plan.hlo import parse_instruction
from imagen_jax.plan.network import Collective, Network, parse_groups, received_bytes, transfer


def whole(name):
    """A slice whose mesh counts chips along the first axis fastest."""
    topology = parse_topology(name)
    reverse = itertools.product(*(range(size) for size in reversed(topology.sizes)))
    return Network(topology, [place[::-1] for place in reverse])


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_notation(text, groups):
    found = parse_groups(f"channel_id=1, {text}, dimensions={{0}}", 8)
    assert sorted(map(list, found)) == groups


def test_unknown_notation_of_groups_is_an_error():
    with pytest.raises(ValueError, match="unknown notation"):
        parse_groups("channel_id=1, replica_groups=ring(8)", 8)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_received_bytes_are_those_of_a_ring(size):
    """Counts what arrives at chip 0 when shards are handed round a ring, one hop a round."""
    shard = 12 * 7  # divisible by all sizes, so that a whole input is
    whole_input = shard * size
    hops = size - 1
    assert received_bytes(Collective.ALL_GATHER, shard, size) == hops * shard
    assert received_bytes(Collective.REDUCE_SCATTER, whole_input, size) == hops * shard
    assert received_bytes(Collective.ALL_REDUCE, whole_input, size) == 2 * hops * shard
    assert received_bytes(Collective.PERMUTE, shard, 2) == shard


def test_a_ring_has_two_links_and_a_line_one():
    network = whole("v5e:16x4")
    link = 0.95 * network.topology.chip.link_bandwidth
    assert network.bandwidth(range(16)) == 2 * link  # a whole axis of 16 closes
    assert network.bandwidth(range(8)) == link
    assert network.bandwidth([0, 16, 32, 48]) == link  # the axis of 4 does not
    assert network.bandwidth(range(64)) == pytest.approx(3 * link)


def test_all_chips_of_a_pod_have_nearly_the_published_bandwidth():
    # 400 GB/s in both directions for a v5e chip, 4800 Gbit/s for v5p: measured in public, 0.855 of it.
    assert whole("v5e:16x16").bandwidth(range(256)) == pytest.approx(0.855 * 200e9)
    assert whole("v5p:4x4x4").bandwidth(range(64)) == pytest.approx(0.855 * 600e9)


def test_what_is_sent_goes_from_chip_to_chip():
    network = whole("v5e:16x4")
    assert network.hops(range(16)) == 8  # round a ring, both ways
    assert network.hops([0, 16, 32, 48]) == 3  # along a line
    assert network.hops(range(64)) == 11
    assert network.hops([0, 15]) == 1  # neighbours where the ring closes
    assert network.hops([0, 48]) == 3  # not neighbours where it does not
    assert network.hops([5]) == 0


def test_transfer_of_an_instruction_takes_its_slowest_group():
    network = whole("v5e:16x2")
    line = "  %g = f32[64]{0} all-gather(%p), channel_id=1, replica_groups=mesh['y'=2,'x'=16] {'y'}, dimensions={0}"
    moved = transfer(parse_instruction(line), 128, network.count)
    assert moved.kind is Collective.ALL_GATHER and moved.received_bytes == 128
    assert len(moved.groups) == 16
    assert network.seconds(moved) == pytest.approx(128 / 42.75e9 + 1e-6)


def test_alone_in_a_group_nothing_moves():
    network = whole("v5e:1x1")
    line = "  %r = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0}}, to_apply=%add"
    assert network.seconds(transfer(parse_instruction(line), 256, 1)) == 0.0
    assert np.isfinite(network.bandwidth([0]))
