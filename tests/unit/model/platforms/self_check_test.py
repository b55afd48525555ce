"""Kernels that are broken on purpose are seen, on one device and on eight, and an engine then runs the reference."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from collector import run

from jaxllama import Engine, SamplingParams, make_mesh
from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.agreement import agreements
from jaxllama.model.platforms import self_check
from jaxllama.model.platforms.platform import Platform

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=6, logprobs=0)
CONFIG = tiny.config_of("divisible").cut_to(2)
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="needs AVX2 or NEON, and a C++ compiler")

attend = native.attend
BREAKS: dict[str, Callable[..., Any]] = {
    "off by one block": lambda q, pool, table, positions, *rest: attend(
        q, pool, table, jnp.maximum(0, positions - 128), *rest
    ),
    "another row's page": lambda q, pool, table, positions, *rest: attend(
        q, pool, jnp.roll(table, 1, axis=0), positions, *rest
    ),
    "one page of another row": lambda q, pool, table, positions, *rest: attend(
        q, pool, table.at[-1, 0].set(table[0, 0]), positions, *rest
    ),
    "another row's queries": lambda q, pool, table, positions, *rest: attend(q[::-1], pool, table, positions, *rest),
    "wrong scale": lambda q, pool, table, positions, *rest: attend(q * 1.001, pool, table, positions, *rest),
    "past a row's end": lambda q, pool, table, positions, *rest: attend(q, pool, table, positions + 1, *rest),
    "no causal mask": lambda q, pool, table, positions, *rest: attend(
        q, pool, table, jnp.broadcast_to(positions.max(1, keepdims=True), positions.shape), *rest
    ),
}


def fault(tp: int, dtype: str = "float32", kv_dtype: str = "float32") -> str | None:
    mesh = make_mesh(CONFIG, tp=tp)
    return self_check.fault_of(CONFIG, mesh, dtype=dtype, kv_dtype=kv_dtype, page_size=4)


@needs_kernels
@pytest.mark.parametrize(("tp", "kv_dtype"), [(1, "float32"), (1, "int8"), (8, "float32")])
def test_whole_kernels_have_no_fault(tp, kv_dtype):
    assert fault(tp, kv_dtype=kv_dtype) is None


@needs_kernels
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_kernel_is_seen(monkeypatch, broken):
    monkeypatch.setattr(native, "attend", BREAKS[broken])
    text = fault(1) or ""
    assert "the kernel CpuAttention for a cache of float32 computes something else than the reference here" in text
    assert "off by nan" in text or broken != "past a row's end", "what lies there is NaN"


@needs_kernels
@pytest.mark.parametrize("broken", ["off by one block", "wrong scale", "past a row's end"])
def test_a_broken_kernel_is_seen_on_eight_devices(monkeypatch, broken):
    monkeypatch.setattr(native, "attend", BREAKS[broken])
    assert "computes something else" in (fault(8) or "")


@needs_kernels
def test_a_row_that_notices_its_batch_is_seen(monkeypatch):
    """By the last place, as another order of summation would."""

    def noticing(q: Any, pool: Any, table: Any, positions: Any, *rest: Any) -> Any:
        out = attend(q, pool, table, positions, *rest)
        return jnp.where((positions > 0).any(axis=1).sum() > 1, jnp.nextafter(out, jnp.inf), out)

    monkeypatch.setattr(native, "attend", noticing)
    assert (fault(1) or "").endswith(
        "here: decode of a row alone has other bits than in a batch; verify of 4 of a row alone has other bits than in "
        "a batch."
    )


IN_GROUP, GROUPS = 3, 2
SHARED_BREAKS: dict[str, Callable[..., Any]] = {
    "another chunk's pages": lambda prefill, q, kv, pool, table, *at: prefill(
        q, kv, pool, jnp.where((at[1] > 0).sum() > 1, jnp.roll(table, 1, axis=0), table), *at
    ),
    "later chunks first": lambda prefill, *args: _in_another_order(prefill, *args),
    "its place": lambda prefill, q, *rest: _nudged(prefill(q, *rest), jnp.arange(len(q)) % IN_GROUP > 0),
    "the others": lambda prefill, q, kv, pool, table, *at: _nudged(
        prefill(q, kv, pool, table, *at), (at[1] > 0).sum() > jnp.ones(len(q))
    ),
}


def _nudged(result: Any, where: Any) -> Any:
    """By the last place."""
    out, pool = result
    return jnp.where(where[:, None, None, None], jnp.nextafter(out, jnp.inf), out), pool


def _in_another_order(prefill: Callable[..., Any], q: Any, kv: Any, pool: Any, *at: Any) -> Any:
    """Each group's chunks from the last to the first."""
    order = jnp.arange(len(q)).reshape(GROUPS, IN_GROUP)[:, ::-1].ravel()
    out, pool = prefill(q[order], kv[order], pool, *(x[order] for x in at))
    return out[order], pool


@needs_kernels
@pytest.mark.parametrize("broken", [None, *SHARED_BREAKS])
def test_chunks_that_share_a_call_are_looked_at(monkeypatch, broken):
    """With the places that the engine's calls have, on two groups of devices."""
    describe, prefill = self_check.describe_platform, ShardedAttention.prefill
    tokens = {"shared_tokens": 32 * IN_GROUP}
    monkeypatch.setattr(
        self_check, "describe_platform", lambda *a, **k: dataclasses.replace(describe(*a, **k), **tokens)
    )
    if broken is not None:
        wrong = SHARED_BREAKS[broken]
        monkeypatch.setattr(ShardedAttention, "prefill", lambda self, *args: wrong(partial(prefill, self), *args))
    mesh = make_mesh(CONFIG, tp=1, data=GROUPS, devices=jax.devices()[:GROUPS])
    found = self_check.fault_of(CONFIG, mesh, dtype="float32", kv_dtype="float32", page_size=4)
    assert (found is None) == (broken is None), found
    if found is not None:
        assert "prefill of 6 chunks" in found
        only_bits = "of a row alone has other bits than in a batch" in found
        assert only_bits == (broken in ("its place", "the others"))


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    monkeypatch.setattr(self_check, "describe_platform", describe_broken)
    monkeypatch.setattr(self_check, "agreements", lambda *_, **__: 1 / 0)
    assert "BrokenAttention for a cache of float32 does not run here: division by zero" in (fault(1) or "")


def test_the_reference_agrees_with_float64():
    """On 8 devices, of which two share a KV head."""
    mesh = make_mesh(CONFIG, tp=8)
    how = {"dtype": "float32", "kv_dtype": "int8", "needs_clean_pages": False}
    found = agreements(ShardedAttention(ReferenceAttention(), mesh), CONFIG, page_size=4, **how)
    assert [each.call for each in found] == ["prefill", "decode", "verify of 4"]
    assert all(each.holds for each in found), found


# ---- At an engine's start ----


@dataclasses.dataclass(frozen=True)
class BrokenAttention(ReferenceAttention):
    """Looks at twice the scale."""

    def _attend(self, q: Any, *rest: Any) -> Any:
        return super()._attend(2 * q, *rest)


def describe_broken(config: Any, mesh: Any, **_: Any) -> Platform:
    """A TPU's platform on a CPU."""
    return Platform("tpu", ShardedAttention(BrokenAttention()), needs_clean_pages=True)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_an_engine_whose_kernel_disagrees_says_so_and_takes_the_reference(monkeypatch, cache, caplog):
    prompt = tiny.prompt_of("divisible", 9)
    options = dataclasses.replace(tiny.SMALL, compilation_cache="off")
    with tiny.make_llama(options=options) as llama:
        reference = Platform("cpu", ShardedAttention(ReferenceAttention()))
        monkeypatch.setattr(self_check, "describe_platform", lambda *_, **__: reference)
        params = tiny.make_params(llama.config, tiny.weights_of("divisible"), llama.mesh)
        engine = Engine(llama.config, params, llama.mesh, options)
        assert engine.stats().kernel_fault is None
        expected = run(engine, prompt, GREEDY).tokens
        engine.close()
        monkeypatch.setattr(self_check, "describe_platform", describe_broken)
        with caplog.at_level(logging.INFO, "jaxllama"):
            engine = Engine(llama.config, params, llama.mesh, options)
        (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "BrokenAttention" in error.getMessage()
        assert "The reference runs in its place" in error.getMessage()
        assert "BrokenAttention" in (engine.stats().kernel_fault or "")
        assert type(engine.platform.kernel) is ReferenceAttention
        assert run(engine, prompt, GREEDY).tokens == expected
        engine.close()
        # The verdict is known then, and of other shapes it is not.
        (kept,) = cache.glob("kernels-*.json")
        assert "BrokenAttention" in json.loads(kept.read_text())["fault"]
        monkeypatch.setattr(self_check, "fault_of", lambda *_, **__: "looked again")
        how = (llama.mesh, "float32", "float32", None)
        assert "BrokenAttention" in (
            self_check.describe_checked(llama.config, *how, options.page_size).kernel_fault or ""
        )
        assert self_check.describe_checked(llama.config, *how, 8).kernel_fault == "looked again"
        kept.write_text("{")
        assert self_check.describe_checked(llama.config, *how, options.page_size).kernel_fault == "looked again"


def test_a_cpu_s_start_does_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(self_check, "fault_of", pytest.fail)
    with tiny.make_llama() as llama:
        assert llama.engine.platform.kernel_fault is None
