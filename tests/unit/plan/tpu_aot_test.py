"""The real TPU compiler, without a TPU: what the planner says of programs that it compiled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxllama import LlamaConfig
from jaxllama.plan import Plan, Setup, Topology, plan, roofline
from jaxllama.plan.compiler import compile_program, is_available
from jaxllama.plan.planner import collectives
from jaxllama.plan.setup import resident_bytes, weight_bytes

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not is_available(), reason="libtpu is not installed: pip install 'jaxllama[tpu]'"),
]

SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(Setup(SMALL, Topology.parse("v6e:2x4"), rows=16, context=1024))


def test_both_programs_are_compiled_and_fit(small):
    assert small.method == "compiled", small.notes
    assert small.fits
    assert set(small.compiled) == {"decode", "prefill"}
    assert 0 < small.compiled["decode"].temporary_bytes < 64 << 20
    assert small.max_rows > 1000


def test_the_compiler_counts_the_bytes_that_the_planner_does(small):
    arguments = small.compiled["decode"].argument_bytes
    assert 1.0 <= arguments / resident_bytes(small.setup).total < 1.05


def test_the_pool_is_written_in_place(small):
    pool = resident_bytes(small.setup).kv
    assert small.compiled["decode"].output_bytes < pool / 4
    assert small.compiled["prefill"].output_bytes < pool / 4
    assert small.decode is not None
    assert not [copy for copy in small.decode.large_copies if copy.bytes >= pool]


def test_a_step_sums_twice_a_layer_over_the_devices(small):
    assert small.decode is not None
    assert small.decode.collectives["all-reduce"] >= 2 * SMALL.num_layers
    rows_bytes = 16 * SMALL.hidden_size * 2
    assert small.decode.collective_bytes["all-reduce"] >= 2 * SMALL.num_layers * rows_bytes


def test_a_step_reads_weights_and_cache_about_once(small):
    assert small.decode is not None
    least = roofline.decode_seconds(small.setup) * small.setup.topology.generation.hbm_bytes_per_s
    assert 0.8 * least < small.decode.hbm_bytes < 2 * least
    assert small.step.seconds > small.step.roofline


def test_the_compiler_s_own_refusal_is_an_answer():
    got = plan(Setup(SMALL, Topology.parse("v5e:2x2"), rows=2048, context=8192))
    assert not got.fits
    assert not got.compiled["decode"].fits
    assert got.compiled["decode"].required_bytes > got.memory.available
    assert 0 < got.max_rows < 2048


def test_int8_saves_half_of_the_weights_traffic(small):
    setup = Setup(SMALL, Topology.parse("v6e:2x4"), rows=16, context=1024, weights="int8")
    got = compile_program(setup, "decode")
    assert got.measurement is not None
    assert small.decode is not None
    read = ("layers", "norm", "lm_head")
    saved = weight_bytes(small.setup, read) - weight_bytes(setup, read)
    assert small.decode.hbm_bytes - got.measurement.hbm_bytes > 0.8 * saved
    assert got.temporary_bytes < 64 << 20


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_heads_of_64_have_kernels_that_copy_nothing(kv):
    """Three KV heads, of which two share a row and one has half of another."""
    config = dataclasses.replace(SMALL, num_heads=9, num_kv_heads=3, head_dim=64)
    setup = Setup(config, Topology.parse("v5e:1x1"), rows=16, context=1024, kv=kv, chunk_tokens=512, prompt_tokens=512)
    for program in ("decode", "prefill"):
        got = compile_program(setup, program)
        assert got.measurement is not None
        # Nobody reads what a chunk's last layer attends to, and an int8 cache is written before its kernel.
        assert got.measurement.num_kernel_calls >= config.num_layers - (program == "prefill")
        assert not [copy for copy in got.measurement.large_copies if copy.bytes >= resident_bytes(setup).kv / 4]
        assert got.output_bytes < resident_bytes(setup).kv / 4, "the pool is not written in place"


def test_messages_are_counted(small):
    """Two sums a layer cross the links; no program hides them."""
    assert small.decode is not None
    rows_bytes = 16 * SMALL.hidden_size * 2
    least = 2 * SMALL.num_layers * 2 * rows_bytes * 7 / 8 / (2 * 90e9)
    assert small.decode.message_s > least
    assert 0 < small.decode.exposed_s <= small.decode.message_s
    assert small.step.seconds >= small.step.roofline + small.decode.exposed_s


def test_a_tpu7x_reads_the_weights_as_they_lie():
    """Its compiler would copy them all into other tiles (`startup.keep_weights_as_they_are`)."""
    config = dataclasses.replace(LlamaConfig.from_hf(json.loads(LLAMA_70B.read_text())), num_layers=1)
    got = compile_program(Setup(config, Topology.parse("tpu7x:2x2x1"), rows=64, context=2048), "decode")
    assert got.measurement is not None
    assert not got.measurement.large_copies
    assert got.temporary_bytes < 100 * 2**20


LLAMA_70B = Path(__file__).parents[3] / "bench" / "configs" / "llama3-70b.json"


@dataclass(frozen=True)
class Bar:
    """What a step of the 70B with a context of 2,048 reaches: docs/tpu.md's bars or better.

    `exchanges` are the collectives of a layer beside its two all-reduces, `traffic` is that of HBM over the least. Of
    temporaries most are tables of 32 bytes that take 16 KiB each, one or two for every piece that is prefetched.
    """

    topology: str
    rows: int
    dtype: str
    ms: float
    async_share: float
    traffic: float = 1.01
    exchanges: Mapping[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    "bar",
    [
        Bar("v6e:2x4", 64, "bf16", 15.2, 0.42),
        # What comes early may be fetched and then put away again.
        Bar("v5e:4x4", 64, "bf16", 15.7, 0.48, traffic=1.015, exchanges={"all-to-all": 2}),
        Bar("v5e:2x4", 128, "int8", 25.0, 0.5),
    ],
    ids=lambda bar: f"{bar.topology}-{bar.dtype}",
)
def test_a_step_of_the_70b_copies_nothing_and_is_near_the_roofline(bar):
    config = LlamaConfig.from_hf(json.loads(LLAMA_70B.read_text()))
    setup = Setup(config, Topology.parse(bar.topology), rows=bar.rows, context=2048, weights=bar.dtype, kv=bar.dtype)
    got = compile_program(setup, "decode")
    assert got.fits
    assert got.temporary_bytes < 100 * 2**20
    assert got.output_bytes < 2**20, "the state is not aliased"
    step = got.measurement
    assert step is not None
    assert not step.large_copies
    found = collectives(step, config.num_layers)
    assert found["per_layer"] == {"all-reduce": 2, **bar.exchanges}
    assert sum(found["outside_layers"].values()) <= 4
    assert step.async_share > bar.async_share
    assert step.hbm_bytes <= bar.traffic * roofline.decode_seconds(setup) * setup.topology.generation.hbm_bytes_per_s
    assert 1e3 * step.seconds <= bar.ms
