"""The planner's arithmetic against figures worked out by hand, and what it makes of the compiler's answers."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracle.tiny_families import TINY_FAMILIES

from jaxllama import LlamaConfig
from jaxllama.errors import PlanError
from jaxllama.model.platforms.chips import GENERATIONS
from jaxllama.plan import Plan, Setup, Topology, as_json, candidates, compiler, plan, planner, roofline, search
from jaxllama.plan.compiler import Compiled, CompilerError, compile_program, read, written
from jaxllama.plan.measure import LargeCopy, Measurement
from jaxllama.plan.report import as_table, as_text
from jaxllama.plan.setup import resident_bytes, weight_bytes

CONFIGS = Path(__file__).parents[3] / "bench" / "configs"
LLAMA_70B, LLAMA_8B = (
    LlamaConfig.from_hf(json.loads((CONFIGS / f"llama3-{size}.json").read_text())) for size in ("70b", "8b")
)
GIB = 2**30


def setup(topology: str = "v6e:2x4", config: LlamaConfig = LLAMA_70B, **values: Any) -> Setup:
    return Setup(config, Topology.parse(topology), **({"rows": 64, "context": 2048, "chunk_tokens": 512} | values))


def analytic(s: Setup, **values: Any) -> Plan:
    return plan(s, use_compiler=False, **values)


# ---- Bytes ----


def test_weights_and_cache_of_the_70b_on_eight_chips():
    got = resident_bytes(setup())
    norms = (2 * 80 + 1) * 8192  # Held whole by every device.
    assert got.weights == 2 * ((70_553_706_496 - norms) // 8 + norms)
    token = 2 * 80 * 1 * 128 * 2  # K and V, layers, one KV head a device, head_dim, bytes.
    assert got.kv == (64 * 16 + 1) * 128 * token  # Page 0 is nobody's.


@pytest.mark.parametrize("data", [1, 2, 4])
def test_twice_the_devices_hold_half_the_cache_however_they_are_split(data):
    eight, sixteen = resident_bytes(setup()), resident_bytes(setup("v6e:4x4", data=data))
    assert sixteen.weights == pytest.approx(0.5 * data * eight.weights, rel=0.02)  # K and V on both of a pair
    assert sixteen.kv == pytest.approx(0.5 * eight.kv, rel=0.01)  # each shard has a page 0


def test_int8_halves_weights_and_cache_but_for_their_scales():
    bf16, int8 = (resident_bytes(setup(weights=kind, kv=kind)) for kind in ("bf16", "int8"))
    assert 0.5 < int8.weights / bf16.weights < 0.501
    assert int8.kv / bf16.kv == pytest.approx((128 + 4) / 256)
    assert int8.state == bf16.state


def test_the_8b_on_one_chip():
    got = resident_bytes(setup("v6e:1x1", LLAMA_8B, rows=16))
    assert got.weights == 2 * 8_030_261_248
    assert got.kv == (16 * 16 + 1) * 128 * 131_072


@pytest.mark.parametrize(
    ("topology", "weights", "fits"),
    [
        ("v6e:2x4", "bf16", True),
        ("v6e:2x2", "bf16", False),
        ("v5e:2x4", "bf16", False),
        ("v5e:2x4", "int8", True),
        ("v5e:4x4", "bf16", True),
        ("v5p:2x2x1", "bf16", True),
        ("v4:2x2x1", "bf16", False),
    ],
)
def test_where_the_70b_fits(topology, weights, fits):
    got = analytic(setup(topology, weights=weights))
    assert got.fits is fits
    assert (got.memory.free >= 0) is fits


# ---- Time ----


@pytest.mark.parametrize(
    ("topology", "weights", "milliseconds"),
    [("v6e:2x4", "bf16", 13.9), ("v5e:4x4", "bf16", 14.1), ("v5e:2x4", "int8", 17.2), ("v5p:2x2x1", "bf16", 16.5)],
)
def test_the_roofline_of_a_70b_step(topology, weights, milliseconds):
    """64 rows of 2,048 tokens; the figures are those of the design sketches, on v5e:4x4 with rows split over pairs."""
    assert 1e3 * roofline.decode_seconds(setup(topology, weights=weights)) == pytest.approx(milliseconds, abs=0.06)


@pytest.mark.parametrize(
    ("topology", "values", "in_group"),
    [
        ("v6e:1x1", {"chunk_tokens": 128}, 4),
        ("v6e:1x1", {"chunk_tokens": 128, "weights": "int8"}, 2),
        ("v6e:2x4", {"chunk_tokens": 128}, 2),
        ("v6e:2x4", {"chunk_tokens": 128, "data": 8}, 4),
        ("v6e:1x1", {"chunk_tokens": 512}, 1),
        ("v5e:1x1", {"chunk_tokens": 128}, 1),
    ],
)
def test_chunks_share_a_call_where_products_wait_for_the_weights(topology, values, in_group):
    """The roofline is that of the weights still: as many as are free. One more would be felt."""
    s = setup(topology, rows=8, context=4096, prompt_tokens=128, **values)
    assert s.chunks_in_group == in_group
    assert roofline.num_calls(dataclasses.replace(s, prompt_tokens=5 * s.chunk_tokens)) == -(-5 // in_group)
    if in_group > 1:
        read = weight_bytes(s, ("layers",)) / s.topology.generation.hbm_bytes_per_s
        assert read <= roofline.chunk_seconds(s) <= 1.1 * read


def test_the_roofline_of_a_70b_chunk():
    """2 × 69.5e9 multiply-adds of 2,048 tokens on 8 × 918 TFLOP/s: 38 ms, and the attention's."""
    s = setup(chunk_tokens=2048, prompt_tokens=2048)
    dense = 2 * 68.45e9 * 2048 / 8 / 918e12
    attention = 4 * 2048 * 1024 * 64 * 128 * 80 / 8 / 918e12
    assert roofline.chunk_seconds(s) == pytest.approx(dense + attention, rel=1e-3)


def test_cost_is_chips_times_price_over_tokens():
    got = analytic(setup(), dollars_per_chip_hour=2.7)
    tokens_per_hour = 64 / got.step.seconds * 3600
    assert got.dollars_per_million_tokens == pytest.approx(8 * 2.7 / tokens_per_hour * 1e6)
    assert analytic(setup()).dollars_per_million_tokens is None


def test_estimates_lie_between_the_roofline_and_the_band():
    got = analytic(setup())
    for estimate in (got.step, got.first_token):
        assert estimate.roofline <= estimate.low <= estimate.seconds < estimate.high
    assert got.step.seconds == pytest.approx(got.step.roofline / 0.75)
    assert got.first_token.seconds > 2 * roofline.chunk_seconds(got.setup)  # Two chunks of 512.


# ---- The largest that fits ----


@pytest.mark.parametrize("topology", ["v6e:2x4", "v5e:4x4", "v5p:2x2x1"])
def test_one_row_more_than_the_most_does_not_fit(topology):
    most = analytic(setup(topology)).max_rows
    assert analytic(setup(topology, rows=most)).fits
    assert not analytic(setup(topology, rows=most + 1)).fits


def test_one_page_more_than_the_longest_context_does_not_fit():
    longest = analytic(setup()).max_context
    assert analytic(setup(context=longest)).fits
    assert not analytic(setup(context=longest + 128)).fits


def test_the_model_bounds_the_context():
    assert analytic(setup("v5p:2x2x2", LLAMA_8B, rows=1)).max_context == 131072


def test_nothing_fits_where_the_weights_do_not():
    got = analytic(setup("v5e:2x2"))
    assert (got.max_rows, got.max_context) == (0, 0)


# ---- What the compiler says ----

DECODE = Measurement(
    seconds=0.016,
    stall_s=0.001,
    hbm_bytes=23e9,
    async_share=0.5,
    large_copies=(LargeCopy("copy", "bf16[1]", "while/body", 5 << 20, 2),),
    collectives={"all-reduce": 161, "all-gather": 2},
    collective_bytes={"all-reduce": 1e6, "all-gather": 1e5},
    num_kernel_calls=80,
    message_s=0.003,
    exposed_s=0.002,
)


def compiled(s: Setup, program: str, *_: Any) -> Compiled:
    """A stand-in for libtpu's answer: 100 MiB of padding, 300 MiB and 200 MiB of temporaries."""
    if program == "decode":
        arguments = resident_bytes(s).total + (100 << 20)
        return Compiled(20.0, True, 0, arguments, 0, 300 << 20, 5 << 20, DECODE)
    return Compiled(10.0, True, 0, 0, 0, 200 << 20, 5 << 20, dataclasses.replace(DECODE, seconds=0.05))


def use_compiler(monkeypatch: pytest.MonkeyPatch, compile_program: Any) -> None:
    monkeypatch.setattr(planner, "compile_program", compile_program)
    monkeypatch.setattr(planner, "is_available", lambda: True)


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(monkeypatch, compiled)


@pytest.mark.usefixtures("fake_compiler")
def test_a_plan_adds_up_what_the_compiler_says():
    got = plan(setup())
    resident = resident_bytes(setup())
    assert got.method == "compiled"
    assert got.memory.temporaries == (300 + 5 + 5) << 20
    assert got.memory.state == resident.state + (100 << 20)
    assert got.memory.total == resident.total + (410 << 20)
    # The roofline is more than the schedule's own part, and messages are waited for beside it.
    step_s = roofline.decode_seconds(setup()) + 0.002
    assert step_s - 0.002 > 0.72 * 0.016
    assert got.step.seconds == pytest.approx(step_s)
    assert got.first_token.seconds == pytest.approx(2 * (0.72 * 0.05 + 0.002) + step_s, rel=0.1)
    assert got.tokens_per_s == pytest.approx(64 / step_s)
    assert got.step_seconds_at(64) == pytest.approx(step_s)
    assert got.step_seconds_at(8) == pytest.approx(
        step_s * roofline.decode_seconds(setup(rows=8)) / roofline.decode_seconds(setup())
    )


def test_plain_attention_may_be_as_fast_as_the_roofline(monkeypatch):
    def without_kernels(s: Setup, program: str, *_: Any) -> Compiled:
        return dataclasses.replace(compiled(s, program), measurement=dataclasses.replace(DECODE, num_kernel_calls=0))

    use_compiler(monkeypatch, without_kernels)
    got = plan(setup())
    assert (got.step.low, got.step.high) == (got.step.roofline, pytest.approx(1.25 * got.step.seconds))
    assert "plain JAX" in got.notes[-1]


@pytest.mark.usefixtures("fake_compiler")
def test_temporaries_grow_with_the_rows():
    most = plan(setup()).max_rows
    assert 64 < most < analytic(setup()).max_rows
    used = resident_bytes(setup(rows=most)).total + (110 << 20) + (300 << 20) * most / 64
    row = 16 * 128 * 40960 + (300 << 20) / 64
    assert 0 <= int(31.24 * GIB) - used < 1.1 * row


def test_running_out_of_memory_means_that_it_does_not_fit(monkeypatch):
    required = 40 * GIB
    use_compiler(monkeypatch, lambda *_: Compiled(5.0, False, required))
    got = plan(setup())
    assert not got.fits
    assert got.memory.total == required
    assert "40.00 GiB of 31.24 GiB" in got.notes[0]
    value = as_json(got)
    assert value["programs"]["decode"]["required_bytes"] == required
    assert value["collectives"] is None
    assert value["tokens_per_s"] is value["step_s"] is value["time_to_first_token_s"] is None
    assert "fits: NO, 8.76 GiB too much" in as_text(got)


def test_a_failing_compiler_leaves_the_analytic_model_and_says_so(monkeypatch):
    def fail(*_: Any) -> Any:
        raise CompilerError("the TPU compiler failed on decode: INTERNAL")

    use_compiler(monkeypatch, fail)
    got = plan(setup())
    assert got.method == "analytic"
    assert got.fits
    assert "INTERNAL" in got.notes[0]
    assert "analytic" in got.notes[0]


def test_a_compiler_without_time_is_ended(monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1000)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    asked = iter([False, True])
    with process, pytest.raises(CompilerError, match="had no more time"):
        compiler._output(process, "{}", lambda: next(asked))
    assert process.returncode == -signal.SIGKILL
    use_compiler(monkeypatch, lambda s, program, time_is_up: compiled(s, program) if not time_is_up() else 1 / 0)
    assert plan(setup()).method == "compiled"
    with pytest.raises(ZeroDivisionError):
        plan(setup(), time_is_up=lambda: True)


def test_without_libtpu_a_plan_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(CompilerError, match=r"pip install 'jaxllama\[tpu\]'"):
        compile_program(setup(), "decode")
    lines: list[str] = []
    got = plan(setup(), progress=lines.append)
    assert got.method == "analytic"
    assert "pip install 'jaxllama[tpu]'" in got.notes[0]
    assert lines == []


# ---- The answer ----


@pytest.mark.usefixtures("fake_compiler")
def test_json_has_every_figure():
    got = plan(setup(), dollars_per_chip_hour=2.0)
    value = as_json(got)
    assert value["fits"] is True
    assert value["mesh"] == {"data": 1, "kv": 8, "rep": 1}
    memory = value["bytes_per_device"]
    parts = ("weights", "kv", "state", "temporaries")
    assert sum(memory[name] for name in parts) == memory["total"] == memory["available"] - memory["free"]
    assert value["max_rows"] > 64
    assert value["max_context"] > 2048
    assert value["tokens_per_s"]["low"] < value["tokens_per_s"]["estimate"] < value["tokens_per_s"]["high"]
    assert value["tokens_per_s"]["roofline"] == pytest.approx(64 / value["step_s"]["roofline"])
    assert value["dollars_per_million_tokens"] == pytest.approx(8 * 2.0 / 3600 / got.tokens_per_s * 1e6)
    assert value["collectives"] == {
        "per_run": {"all-reduce": 161, "all-gather": 2},
        "per_layer": {"all-reduce": 2},
        "outside_layers": {"all-reduce": 1, "all-gather": 2},
    }
    assert value["programs"]["decode"]["measurement"]["large_copies"][0]["count"] == 2
    assert value["programs"]["prefill"]["compile_s"] == 10.0
    assert value["error_band"] == 0.25


@pytest.mark.usefixtures("fake_compiler")
def test_the_text_says_the_same():
    got = plan(setup(), dollars_per_chip_hour=2.0)
    text, tokens_per_s = as_text(got), f"{got.tokens_per_s:,.0f}"
    for part in (
        "fits: yes",
        "16.43 GiB",
        tokens_per_s,
        "within 25%",
        "2 all-reduce a layer",
        "1 all-reduce, 2 all-gather",
    ):
        assert part in text
    assert "2, the largest 5 MiB" in text
    assert "3.00 ms on the links between chips, 2.00 ms of it waited for" in text


@pytest.mark.usefixtures("fake_compiler")
def test_only_v5e_has_the_band_of_what_was_measured():
    assert plan(setup("v5e:4x4")).band < plan(setup("v5p:2x2x1")).band < analytic(setup("v5e:4x4")).band


# ---- Search ----


@pytest.mark.usefixtures("fake_compiler")
def test_a_search_compiles_the_best_few_and_recommends_the_cheapest():
    prices = {"v6e": 2.7, "v5e": 1.2, "v5p": 4.2, "v4": 3.2, "tpu7x": 12.0}
    plans = search(candidates(setup(), everywhere=True), dollars=prices.get)
    done = [p for p in plans if p.method == "compiled"]
    assert 1 <= len(done) <= 3
    assert plans[: len(done)] == done
    costs = [p.dollars_per_million_tokens for p in done]
    assert costs == sorted(costs)
    assert all(p.fits for p in plans)
    assert {p.setup.topology.generation.name for p in plans} == set(GENERATIONS)
    assert len(as_table(plans).splitlines()) == len(plans) + 1


def test_without_prices_a_search_goes_by_tokens_a_chip(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    plans = search(candidates(setup("v6e:4x4"), everywhere=False))
    rates = [p.tokens_per_s / p.setup.topology.num_chips for p in plans]
    assert rates == sorted(rates, reverse=True)
    assert {p.setup.topology.name for p in plans} == {"v6e:4x4"}
    assert "jaxllama[tpu]" in plans[0].notes[0]


def test_a_search_among_what_does_not_fit_says_so():
    with pytest.raises(PlanError, match="nothing fits of v5e:2x2 with 64 rows of 2048 tokens"):
        search(candidates(setup("v5e:2x2"), everywhere=False))


def test_meshes_of_a_search_split_everything_evenly():
    found = candidates(setup("v6e:4x4"), everywhere=False)
    assert {(s.data, s.tp) for s in found} == {(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)}
    assert {s.data for s in candidates(setup("v6e:4x4", rows=6), everywhere=False)} == {1, 2}
    wide = candidates(setup("v5e:4x8"), everywhere=False)
    assert {(s.data, s.tp) for s in wide} >= {(1, 32), (2, 16), (4, 8)}


# ---- Bad input ----


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"context": 131073}, "131072"),
        ({"data": 3}, "data=3 does not divide the 8 devices"),
        ({"weights": "int4"}, "weights must be one of bf16, int8"),
        ({"kv": "fp8"}, "kv must be one of"),
        ({"chunk_tokens": 100}, "multiple of page_size"),
        ({"prompt_tokens": 4096}, "more than the context"),
    ],
)
def test_values_that_contradict_are_refused(values, named):
    with pytest.raises(PlanError, match=named):
        setup(**values)


@pytest.mark.parametrize("name", ["", "v6e", "v6e:2x5", "v6e-8", "v9:2x2", "v5p:2x4", "v6e:2x4 "])
def test_an_unknown_topology_lists_the_known(name):
    with pytest.raises(PlanError) as caught:
        Topology.parse(name)
    for part in (repr(name), "v6e: 1x1, 2x2, 2x4", "v5p: 1x1x1", "tpu7x"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [*TINY_FAMILIES, None])
def test_a_setup_survives_the_way_to_the_compiler_s_process(name):
    """A configuration is static under `jax.jit`: it must be hashable there too."""
    config = LLAMA_70B if name is None else LlamaConfig.from_hf(TINY_FAMILIES[name])
    planned = setup("v6e:2x2", config, rows=2, context=64, prompt_tokens=32)
    told = read(written(planned, "decode"))
    assert told == (planned, "decode")
    assert hash(told[0]) == hash(planned)


def test_devices_and_chips_differ_where_a_chip_has_two():
    topology = Topology.parse("tpu7x:2x2x1")
    assert (topology.num_chips, topology.num_devices) == (4, 8)
    assert Topology.parse("v4:2x2x2").num_devices == 8
