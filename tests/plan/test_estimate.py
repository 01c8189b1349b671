import dataclasses

import pytest

from imagen_jax.plan.chips import parse_topology
from imagen_jax.plan.estimate import Origin, estimate_text
from imagen_jax.plan.network import Collective, Network

TOPOLOGY = parse_topology("v5e:2x2")
COORDINATES = [(0, 0), (1, 0), (0, 1), (1, 1)]
NETWORK = Network(TOPOLOGY, COORDINATES)
CHIP = TOPOLOGY.chip
PAIRS = "replica_groups={{0,1},{2,3}}"  # neighbours, one link: 95 % of 45 GB/s
GATHER_MS = 1e3 * 100e6 / 42.75e9 + 1e-3  # of 100 MB over it, and the microsecond on the way
MILLISECOND = int(CHIP.clock_hz / 1000)  # cycles


def cycles(milliseconds):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{round(milliseconds * MILLISECOND)}"}}}}'


def program(entry, *computations):
    body = "\n".join(f"  {line}" for line in entry)
    others = "\n\n".join(
        f"%{name} (p: f32[]) -> f32[] {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}"
        for name, lines in computations
    )
    return f"HloModule jit_step, is_scheduled=true\n\n{others}\n\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n"


def work(name, milliseconds):
    return f"%{name} = f32[8] fusion(%x), kind=kLoop, calls=%nothing, {cycles(milliseconds)}"


def predict(entry, *computations):
    nothing = ("nothing", ["ROOT %r = f32[] parameter(0)"])
    return estimate_text(
        program(["%x = f32[25000000] parameter(0)", *entry], nothing, *computations), NETWORK
    )


def test_cycles_add_up():
    found = predict([work("a", 2.0), work("b", 3.0)])
    assert found.seconds == pytest.approx(5e-3, rel=1e-5)
    assert found.compiler_s == found.seconds


def test_nested_loops_multiply():
    loop = 'while(%s), condition=%c, body=%{}, backend_config={{"known_trip_count":{{"n":"{}"}}}}'
    found = predict(
        ["%l = f32[] " + loop.format("outer", 3), work("a", 1.0)],
        ("outer", [work("b", 2.0), "%k = f32[] " + loop.format("inner", 4)]),
        ("inner", [work("c", 0.5)]),
    )
    assert found.seconds == pytest.approx((1.0 + 3 * (2.0 + 4 * 0.5)) * 1e-3, rel=1e-5)


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    found = predict(["%l = f32[] while(%s), body=%inner"], ("inner", [work("c", 0.5)]))
    assert found.seconds == pytest.approx(0.5e-3, rel=1e-5)
    assert found.unknown_loops == ("l",)


def test_a_conditional_takes_its_costlier_branch_and_a_call_its_computation():
    found = predict(
        [
            "%c = f32[] conditional(%p, %x, %x), branch_computations={%cheap, %dear}",
            "%d = f32[] call(%x), to_apply=%cheap",
        ],
        ("cheap", [work("a", 1.0)]),
        ("dear", [work("b", 4.0)]),
    )
    assert found.seconds == pytest.approx(5e-3, rel=1e-5)


def test_a_fusion_is_not_entered_for_what_it_contains():
    found = predict(
        [f"%f = f32[8] fusion(%x), kind=kOutput, calls=%fused, {cycles(1.0)}"], ("fused", [work("a", 7.0)])
    )
    assert found.seconds == pytest.approx(1e-3, rel=1e-5)


def test_a_collective_with_nothing_beside_it_is_waited_for():
    # 100 MB on each of two chips: each receives half of it twice, over one link.
    found = predict(
        [work("a", 1.0), f"%r = f32[25000000] all-reduce(%x), channel_id=1, {PAIRS}, to_apply=%add"]
    )
    assert found.exposed_s == pytest.approx(100e6 / 42.75e9 + 2e-6)
    assert found.seconds == pytest.approx(1e-3 + found.exposed_s, rel=1e-5)
    (total,) = found.collectives
    assert (total.kind, total.chips, total.count) == (Collective.ALL_REDUCE, 2, 1)
    assert total.received_bytes == 100_000_000


@pytest.mark.parametrize("beside, exposed", [(0.5, GATHER_MS - 0.5), (2.5, 0.0), (5.0, 0.0)])
def test_work_between_start_and_done_hides_a_collective(beside, exposed):
    found = predict(
        [
            f"%s = (f32[25000000], f32[50000000]) all-gather-start(%x), channel_id=1, {PAIRS}, dimensions={{0}}",
            work("a", beside),
            "%d = f32[50000000] all-gather-done(%s)",
        ]
    )
    assert found.exposed_s == pytest.approx(exposed * 1e-3, rel=1e-4, abs=1e-9)
    assert found.seconds == pytest.approx((beside + exposed) * 1e-3, rel=1e-4)


def test_collectives_in_flight_share_the_links():
    start = f"all-gather-start(%x), channel_id=1, {PAIRS}, dimensions={{0}}"
    found = predict(
        [
            f"%s1 = (f32[25000000], f32[50000000]) {start}",
            f"%s2 = (f32[25000000], f32[50000000]) {start}",
            work("a", 3.0),
            "%d1 = f32[50000000] all-gather-done(%s1)",
            "%d2 = f32[50000000] all-gather-done(%s2)",
        ]
    )
    assert found.exposed_s == pytest.approx(
        (2 * GATHER_MS - 3.0) * 1e-3, rel=1e-4
    )  # of both, 3 ms are hidden


@pytest.mark.parametrize(
    "kind, share",
    [("ALL_REDUCE", 4 / 3), ("REDUCE_SCATTER", 2 / 3), ("ALL_GATHER", 2.0), ("ONE_TO_ONE", 1.0)],
)
@pytest.mark.parametrize("beside", [0.5, 100.0])
def test_what_goes_to_other_slices_goes_beside_the_links(kind, share, beside):
    attributes = (
        'channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="sum.1",'
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    text = program(
        [
            "%x = f32[2500000] parameter(0)",
            f"%r = (f32[2500000], u32[], token[]) recv(%t), {attributes}",
            f"%s = (f32[2500000], u32[], token[]) send(%x, %t), {attributes}",
            f"%g = f32[5000000] all-gather(%x), channel_id=1, {PAIRS}, dimensions={{0}}",
            work("a", beside),
            "%sd = token[] send-done(%s), channel_id=2",
            "%d = (f32[2500000], token[]) recv-done(%r), channel_id=2",
        ],
        ("nothing", ["ROOT %r = f32[] parameter(0)"]),
    )
    topology = parse_topology("v5e:2x2", 3)
    found = estimate_text(text, Network(topology, COORDINATES))
    moved = share * 10e6
    gather = 10e6 / 42.75e9 + 1e-6
    waited = max(0.0, moved / 3.125e9 - gather - beside * 1e-3)
    assert found.exposed_s == pytest.approx(gather + waited, rel=1e-4)
    (total,) = (each for each in found.collectives if each.kind is Collective.BETWEEN_SLICES)
    assert (total.chips, total.count, total.received_bytes) == (3, 1, pytest.approx(moved, abs=1))


def test_a_collective_that_libtpu_splits_counts_once_and_overlaps():
    gather = f"all-gather(%p), channel_id=24, {PAIRS}, dimensions={{0}}"
    begin = ["%p = f32[25000000] parameter(0)", f"%g = f32[50000000] {gather}"]
    found = predict(
        [
            "%s = (f32[25000000], f32[50000000]) fusion(%x), kind=kCustom, calls=%start",
            f"%m = f32[8] fusion(%x), kind=kOutput, calls=%middle, {cycles(0.5)}",
            "%d = f32[50000000] fusion(%s), kind=kCustom, calls=%end",
        ],
        ("start", [*begin, '%c = f32[] custom-call(%g), custom_call_target="AsyncCollectiveStart"']),
        ("middle", begin),
        ("end", [*begin, '%c = f32[] custom-call(%g), custom_call_target="AsyncCollectiveDone"']),
    )
    (total,) = found.collectives
    assert (total.count, total.received_bytes) == (1, 100_000_000)
    assert found.exposed_s == pytest.approx((GATHER_MS - 0.5) * 1e-3, rel=1e-4)


def test_an_all_reduce_that_is_scattered_in_a_fusion_is_a_reduce_scatter():
    found = predict(
        ["%f = f32[12500000] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7"],
        (
            "all-reduce-scatter.7",
            [
                "%p = f32[25000000] parameter(0)",
                f"%r = f32[25000000] all-reduce(%p), channel_id=1, {PAIRS}, to_apply=%add",
                "ROOT %s = f32[12500000] dynamic-slice(%r)",
            ],
        ),
    )
    assert found.collectives[0].kind is Collective.REDUCE_SCATTER
    assert found.exposed_s == pytest.approx(50e6 / 42.75e9 + 1e-6)


def test_a_kernel_takes_what_its_chip_does_in_a_cycle_or_memory_gives():
    kernel = (
        '%k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
        '{{"custom_call_config":{{"body":"TUzv","cost_estimate":{{"flops":"{}","bytes_accessed":"{}"}}}}}}'
    )
    arithmetic = predict([kernel.format(MILLISECOND * CHIP.kernel_flops_per_cycle, 8)])
    assert arithmetic.kernel_s == arithmetic.seconds == pytest.approx(1e-3, rel=1e-5)
    memory = predict([kernel.format(8, 819 * 10**6)])  # 1 ms at HBM bandwidth
    assert memory.kernel_s == pytest.approx(1e-3 / 0.6)


def test_data_moved_without_an_estimate_costs_hbm_bandwidth():
    found = predict(["%r = f32[5000,5000] reshape(%x)", "%b = f32[25000000] bitcast(%r)"])
    assert found.unestimated_s == found.seconds == pytest.approx(200e6 / 819e9)


def test_operations_are_gathered_by_their_line_and_pass():
    where = 'metadata={{op_name="{}" source_file="/here/imagen_jax/models/layers.py" source_line=85}}'
    lines = [
        work("a", 1.0) + ", " + where.format("jit(step)/jvp()/dot_general"),
        work("b", 2.0) + ", " + where.format("jit(step)/transpose(jvp())/dot_general"),
        work("c", 4.0) + ", " + where.format("jit(step)/transpose(jvp())/dot_general"),
        work("d", 8.0) + ", " + where.format("jit(step)/transpose(jvp())/rematted_computation/mul"),
    ]
    found = predict(lines)
    source = "imagen_jax/models/layers.py:85"
    assert {origin: round(seconds * 1e3, 3) for origin, seconds in found.operations} == {
        Origin(source, "mul, recomputed"): 8.0,
        Origin(source, "dot_general, backward"): 6.0,
        Origin(source, "dot_general, forward"): 1.0,
    }
    assert [seconds for _, seconds in found.operations] == sorted(
        (seconds for _, seconds in found.operations), reverse=True
    )


def test_the_parts_add_up_to_the_whole():
    found = predict(
        [
            work("a", 1.0),
            f"%r = f32[25000000] all-reduce(%x), channel_id=1, {PAIRS}, to_apply=%add",
            "%m = f32[5000,5000] reshape(%x)",
        ]
    )
    parts = dataclasses.astuple(found)[1:5]
    assert found.seconds == pytest.approx(sum(parts))
    assert found.seconds == pytest.approx(sum(seconds for _, seconds in found.operations))
