"""What messages cost: by hand for one slice each, laws that hold for all, and groups read from HLO."""

from __future__ import annotations

import itertools

import pytest

from jaxllama.model.platforms.chips import GENERATIONS
from jaxllama.plan.links import HOP_S, Links, first_group
from jaxllama.plan.measure import measure
from jaxllama.plan.topology import Topology, all_topologies

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def links_of(name: str) -> Links:
    topology = Topology.parse(name)
    return Links(topology, tuple(itertools.product(*(range(side) for side in topology.sides))))


def test_an_all_reduce_crosses_the_mesh_twice_over_two_links():
    """A corner of a 4 × 4 mesh has two neighbours, and the corner across is six hops away."""
    got = links_of("v5e:4x4").seconds("all-reduce", 1e6, range(16))
    assert got == pytest.approx(2 * (1e6 * 15 / 16 / (2 * 45e9) + 6 * HOP_S))


def test_a_torus_has_twice_the_links_and_half_the_way():
    got = links_of("v5e:16x16").seconds("all-gather", 1e6, range(256))
    assert got == pytest.approx(1e6 * 255 / 256 / (4 * 45e9) + 16 * HOP_S)


def test_neighbours_exchange_half_of_what_they_have():
    got = links_of("v5e:4x4").seconds("all-to-all", 1e6, [0, 1])
    assert got == pytest.approx(0.5e6 / 45e9 + HOP_S)


def test_a_permute_takes_the_longest_way():
    got = links_of("v6e:2x4").seconds("collective-permute", 9e6, [0, 1, 1, 2, 3, 0])
    assert got == pytest.approx(9e6 / 90e9 + 3 * HOP_S)


@pytest.mark.parametrize("topology", [t.name for t in all_topologies() if t.num_chips > 1])
def test_more_bytes_take_longer_and_one_device_says_nothing(topology):
    links = links_of(topology)
    everyone = range(len(links.coords))
    for kind in KINDS:
        one, two = (links.seconds(kind, nbytes, everyone) for nbytes in (1e6, 2e6))
        assert 0 < one < two < 2 * one
        assert links.seconds(kind, 1e6, [3 % len(links.coords)]) == 0
    halves = sum(
        links.seconds(kind, nbytes, everyone)
        for kind, nbytes in (("reduce-scatter", 1e6 / len(everyone)), ("all-gather", 1e6))
    )
    assert links.seconds("all-reduce", 1e6, everyone) == pytest.approx(halves)


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}, x={1}", [0, 2, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true", list(range(8))),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x", [0, 1]),
        ("source_target_pairs={{0,1},{1,2},{2,0}}, x", [0, 1, 1, 2, 2, 0]),
        ("to_apply=%add", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_are_read(attributes, want):
    assert first_group(attributes, 8) == want


def text(between: str) -> str:
    """A message of 8 MiB that is started, work of `between`, and its end."""
    big = "bf16[4194304]{0:T(1024)S(1)}"
    return (
        "HloModule m, is_scheduled=true\nENTRY %main (p: f32[8]) -> f32[8] {\n"
        f"  %p = {big} parameter(0)\n"
        f"  %start = {big} all-reduce-start(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%add\n"
        f"{between}  ROOT %done = {big} all-reduce-done(%start)\n}}"
    )


def test_work_hides_a_message_that_is_started_before_it():
    chip, links = GENERATIONS["v6e"], links_of("v6e:2x2")
    message_s = links.seconds("all-reduce", 8 * 2**20, range(4))
    alone = measure(text(""), chip, links=links)
    assert alone.message_s == alone.exposed_s == pytest.approx(message_s)
    cycles = round(message_s / 4 * chip.clock_hz)
    busy = f'  %q = f32[8]{{0:S(1)}} add(%p, %p), backend_config={{"estimated_cycles":"{cycles}"}}\n'
    beside = measure(text(busy), chip, links=links)
    assert beside.message_s == pytest.approx(message_s)
    assert beside.exposed_s == pytest.approx(0.75 * message_s, rel=1e-3)
    assert beside.seconds == pytest.approx(message_s / 4, rel=1e-3)
    assert measure(text(busy * 1), chip).message_s == 0
