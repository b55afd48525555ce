"""Reading scheduled HLO: a real program whose traffic is counted by hand, and small texts for one rule each."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllama.model.platforms.chips import GENERATIONS
from jaxllama.plan.measure import KernelWork, measure

V6E = GENERATIONS["v6e"]
GOLDEN = Path(__file__).parents[2] / "golden" / "tpu_v6e.hlo"
STEPS, TRIPS = 2, 3
ROWS_BYTES = 64 * 2048 * 2
WEIGHT_BYTES = 2048 * 2048 * 2
TABLE_BYTES = 2048 * 4096 * 2


@pytest.fixture(scope="module")
def golden() -> str:
    return GOLDEN.read_text()


def test_traffic_is_what_the_program_must_move(golden):
    """A trip reads both weights and reads, prefetches and writes the rows; a step writes one of the pool's 16 pages."""
    trip = 2 * WEIGHT_BYTES + 3 * ROWS_BYTES
    step = TRIPS * trip + 3 * ROWS_BYTES  # The page is read, chosen and written.
    want = STEPS * step + 2 * TABLE_BYTES
    got = measure(golden, V6E, unknown_trips=(STEPS,))
    assert want <= got.hbm_bytes < want + 1024  # Counters and flags.
    copied_beside = STEPS * TRIPS * 2 * ROWS_BYTES + TABLE_BYTES
    assert got.async_share == pytest.approx(copied_beside / want, rel=1e-4)


def test_collectives_count_every_trip(golden):
    got = measure(golden, V6E, unknown_trips=(STEPS,))
    assert got.collectives == {"all-reduce": STEPS * TRIPS}
    assert got.collective_bytes == {"all-reduce": STEPS * TRIPS * ROWS_BYTES}


def test_only_the_transposed_table_is_a_large_copy(golden):
    (copy,) = measure(golden, V6E).large_copies
    assert (copy.source, copy.bytes, copy.count) == ("table", TABLE_BYTES, 1)


def test_time_is_the_sum_of_the_compiler_s_estimates_and_of_what_waits(golden):
    """The copies of the rows and the table are hidden or nearly so."""
    cycles = STEPS * (TRIPS * (35518 + 2836) + 2123 + 3332)
    got = measure(golden, V6E, unknown_trips=(STEPS,))
    least = cycles / V6E.clock_hz
    table = TABLE_BYTES / V6E.hbm_bytes_per_s
    assert least < got.seconds < least + 6 * table
    assert got.stall_s < 0.02 * got.seconds


def test_unknown_loops_take_the_trips_they_are_given(golden):
    one, four = (measure(golden, V6E, unknown_trips=(n,)) for n in (1, 4))
    assert four.collectives["all-reduce"] == 4 * one.collectives["all-reduce"]
    step = one.hbm_bytes - 2 * TABLE_BYTES
    assert four.hbm_bytes - 2 * TABLE_BYTES == pytest.approx(4 * step, rel=1e-4)


def module(entry: str, *computations: str) -> str:
    return "\n".join(
        ["HloModule m, is_scheduled=true", *computations, "ENTRY %main (p: f32[8]) -> f32[8] {", entry, "}"]
    )


MIB = 2**20
BIG = "bf16[2097152]{0:T(1024)}"  # 4 MiB


def test_kernels_share_the_work_they_are_given():
    kernel = f'{BIG} custom-call(%p), custom_call_target="tpu_custom_call"'
    text = module(f"  %p = {BIG} parameter(0)\n  %a = {kernel}\n  ROOT %b = {kernel}")
    got = measure(text, V6E, kernels=KernelWork(hbm_bytes=1.64e9))
    assert got.num_kernel_calls == 2
    assert got.hbm_bytes == 1.64e9
    assert got.seconds == pytest.approx(1e-3)
    slow = measure(text, V6E, kernels=KernelWork(hbm_bytes=1.64e9, seconds=3e-3))
    assert slow.seconds == pytest.approx(3e-3)


def test_without_kernels_their_work_does_not_count():
    got = measure(module(f"  ROOT %p = {BIG} parameter(0)"), V6E, kernels=KernelWork(hbm_bytes=1e9, seconds=1.0))
    assert (got.seconds, got.hbm_bytes, got.num_kernel_calls) == (0.0, 0.0, 0)


def test_a_prefetch_hides_behind_computation_and_the_rest_is_waited_for():
    def text(cycles: int) -> str:
        busy = f'f32[8]{{0:S(1)}} add(%q, %q), backend_config={{"estimated_cycles":"{cycles}"}}'
        return module(
            f"  %p = {BIG} parameter(0)\n  %q = f32[8]{{0:S(1)}} parameter(1)\n"
            f"  %start = (bf16[2097152]{{0:T(1024)S(1)}}, {BIG}, u32[]{{:S(2)}}) copy-start(%p)\n"
            f"  %busy = {busy}\n  ROOT %done = bf16[2097152]{{0:T(1024)S(1)}} copy-done(%start)"
        )

    copy_s = 4 * MIB / V6E.hbm_bytes_per_s
    hidden = measure(text(round(2 * copy_s * V6E.clock_hz)), V6E)
    assert hidden.stall_s == 0
    assert hidden.seconds == pytest.approx(2 * copy_s, rel=1e-3)
    late = measure(text(round(copy_s / 4 * V6E.clock_hz)), V6E)
    assert late.stall_s == pytest.approx(0.75 * copy_s, rel=1e-3)
    assert late.seconds == pytest.approx(copy_s, rel=1e-3)
    assert late.async_share == 1.0
    assert not late.large_copies


def test_of_a_conditional_the_first_branch_counts():
    false = f"%no (a: f32[8]) -> f32[8] {{\n  ROOT %a = {BIG} parameter(0)\n}}"
    true = f"%yes (b: f32[8]) -> f32[8] {{\n  %b = {BIG} parameter(0)\n  ROOT %c = {BIG} copy(%b)\n}}"
    entry = f"  %p = {BIG} parameter(0)\n  %i = s32[] parameter(1)\n  ROOT %r = {BIG} conditional(%i, %p, %p), "
    first = measure(module(entry + "branch_computations={%no, %yes}", false, true), V6E)
    assert first.hbm_bytes == 0
    other = measure(module(entry + "branch_computations={%yes, %no}", false, true), V6E)
    assert other.hbm_bytes == 8 * MIB
    assert other.large_copies[0].bytes == 4 * MIB


def test_a_collective_inside_a_fusion_counts():
    body = (
        "%all-reduce-scatter.1 (a: f32[8]) -> f32[2] {\n  %a = f32[8]{0} parameter(0)\n"
        "  %sum = f32[8]{0} all-reduce(%a), to_apply=%add\n  ROOT %own = f32[2]{0} slice(%sum), slice={[0:2]}\n}"
    )
    entry = "  %p = f32[8]{0} parameter(0)\n  ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    got = measure(module(entry, body), V6E)
    assert got.collectives == {"reduce-scatter": 1}
    assert got.collective_bytes == {"reduce-scatter": 8}


def test_a_collective_on_cores_of_its_own_counts():
    inner = "%inner (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n  ROOT %sum = f32[8]{0} all-reduce(%a)\n}"
    custom = 'custom-call(%b), custom_call_target="TODO", called_computations={%inner}'
    outer = f"%outer (b: f32[8]) -> f32[8] {{\n  %b = f32[8]{{0}} parameter(0)\n  ROOT %c = f32[8]{{0}} {custom}\n}}"
    entry = (
        "  %p = f32[8]{0} parameter(0)\n  %s = ((f32[8]{0}), f32[8]{0}) async-start(%p), calls=%outer\n"
        "  ROOT %d = f32[8]{0} async-done(%s)"
    )
    got = measure(module(entry, inner, outer), V6E)
    assert got.collectives == {"all-reduce": 1}
    assert got.collective_bytes == {"all-reduce": 32}


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        measure("HloModule nothing", V6E)
