import pytest

from imagen_jax.errors import UserError
from imagen_jax.plan.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    "text, count, rings",
    [
        ("v5e:16x16", 256, [True, True]),
        ("v5e:4x16", 64, [False, True]),
        ("v6e:1x1", 1, [False, False]),
        ("v4:2x2x1", 4, [False, False, False]),
        ("v5p:4x4x8", 128, [True, True, True]),
        ("v4:4x4x2", 32, [False, False, False]),
    ],
)
def test_topologies(text, count, rings):
    topology = parse_topology(text)
    assert (topology.name, topology.count) == (text, count)
    assert [topology.wraps(axis) for axis in range(len(topology.sizes))] == rings


@pytest.mark.parametrize(
    "text", ["", "v5e", "v3:2x2", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "v5e:4x", "v5e:axb"]
)
def test_what_is_no_topology_names_the_flag(text):
    with pytest.raises(UserError, match=f"--topology={text}"):
        parse_topology(text)


def test_unknown_chip_lists_the_known_ones():
    with pytest.raises(UserError, match="v4, v5e, v5p, v6e"):
        parse_topology("v9:2x2")


def test_several_slices():
    topology = parse_topology("v5e:16x16", 2)
    assert (topology.name, topology.slice_name, topology.count) == ("2 slices of v5e:16x16", "v5e:16x16", 512)


@pytest.mark.parametrize("slices", [0, -1, 10**9])
def test_a_wrong_number_of_slices_is_named(slices):
    with pytest.raises(UserError, match=f"--slices={slices}"):
        parse_topology("v5e:16x16", slices)


def test_slices_of_a_chip_whose_network_is_not_known_are_refused():
    with pytest.raises(UserError, match=r"--slices=2: .* of v4"):
        parse_topology("v4:2x2x1", 2)


@pytest.mark.parametrize("name, clock", [("v4", 1.05e9), ("v5e", 1.5e9), ("v5p", 1.75e9)])
def test_clocks_are_the_published_ones(name, clock):
    # v4: arXiv 2304.01433, table 4; the others: "How to scale your model", jax-ml.github.io/scaling-book/tpus.
    assert CHIPS[name].clock_hz == pytest.approx(clock, rel=5e-3)
