"""`jaxllama check`: its parts see what is broken; its table and code say so. Kernels have `self_check_test.py` too."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxllama import __main__ as cli
from jaxllama import make_mesh
from jaxllama.llama.check import bits, kernels, model, speed, steps
from jaxllama.llama.check import cli as check_cli
from jaxllama.llama.check.result import Result, as_markdown, collected
from jaxllama.model import native
from jaxllama.model.platforms.chips import public_peaks

TIMEOUT_S = 600.0
multiply = native.multiply
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="needs AVX2 or NEON, and a C++ compiler")


def one_device() -> Any:
    return make_mesh(model.SMALL, tp=1)


def status_of(results: Any) -> list[str]:
    return [result.status for result in results]


@needs_kernels
@pytest.mark.parametrize("broken", ["no", "scale", "block", "nan"])
def test_a_broken_product_is_seen(monkeypatch, broken):
    def wrong(x: Any, *weights: Any, **options: Any) -> Any:
        products = multiply(x, *weights, **options)
        if broken == "scale":
            return [1.001 * product for product in products]
        if broken == "block":  # Of 16 outputs, the last.
            return [product.at[..., -16:].set(0) for product in products]
        return [product.at[-1, -1].set(jnp.nan) for product in products]

    if broken != "no":
        monkeypatch.setattr(native, "multiply", wrong)
    config = tiny.config_of("divisible")
    found = status_of(kernels.check_products(config, make_mesh(config, tp=1)))
    assert found == ["holds" if broken == "no" else "fails"] * 3


@needs_kernels
def test_every_kernel_of_this_machine_is_looked_at():
    config = tiny.config_of("divisible")
    results = list(kernels.check_attention(config, make_mesh(config, tp=2)))
    assert status_of(results) == ["holds"] * 9
    assert {result.what.split(", ")[2].split(":")[0] for result in results} == {
        "bfloat16 cache",
        "int8 cache",
        "float32 cache",
    }


@needs_kernels
@pytest.mark.parametrize("broken", ["page", "row", "last place", "scale"])
def test_a_broken_kernel_is_named(monkeypatch, broken):
    """In bfloat16, whose bounds are the widest, with the sizes that a CPU is looked at with."""
    attend = native.attend

    def wrong(q: Any, pool: Any, table: Any, positions: Any, *rest: Any) -> Any:
        if broken == "page":
            table = table.at[-1, 0].set(table[0, 0])
        if broken == "row":
            table = jnp.roll(table, 1, axis=0)
        out = attend(q * (1.02 if broken == "scale" else 1), pool, table, positions, *rest)
        several = (positions > 0).any(axis=1).sum() > 1
        return jnp.where(several, jnp.nextafter(out, jnp.ones_like(out)), out) if broken == "last place" else out

    monkeypatch.setattr(native, "attend", wrong)
    monkeypatch.setattr(kernels, "CASES", kernels.CASES[:1])
    prefill, decode, verify = kernels.check_attention(model.SMALL, one_device())
    assert prefill.what == "CpuAttention, 8/4 heads of 64, bfloat16 cache: prefill"
    # A chunk has one row.
    assert prefill.status == ("fails" if broken == "scale" else "holds")
    for result in (decode, verify):
        assert result.status == "fails"
        assert "a row alone has OTHER BITS" in result.found or broken != "last place"
        assert (result.figures["share"] <= 1) == (broken == "last place")


def test_a_wrong_layer_is_seen(monkeypatch):
    """Whatever its kernels do by themselves."""
    config = tiny.config_of("divisible")
    run = kernels.prefill_logits

    def wrong(*args: Any, platform: Any) -> Any:
        logits, pool = run(*args, platform=platform)
        return logits * (1.0 if platform.name == "reference" else 1.1), pool

    mesh = make_mesh(config, tp=4)
    assert status_of(kernels.check_model(config, mesh)) == ["holds"] * 2
    monkeypatch.setattr(
        kernels, "Platform", lambda _, *rest, **options: kernels_platform("reference", *rest, **options)
    )
    monkeypatch.setattr(kernels, "prefill_logits", wrong)
    assert status_of(kernels.check_model(config, mesh)) == ["fails"] * 2


kernels_platform = kernels.Platform


def test_bits_that_are_promised_must_be_the_same():
    one: list[bits.Answer] = [([1, 2], [-0.5, -0.25])]
    other: list[bits.Answer] = [([1, 2], [-0.5, -0.2500001])]
    assert bits._compared("x", one, one, promised=True).status == "holds"
    assert bits._compared("x", one, other, promised=True).status == "fails"
    note = bits._compared("x", one, other, promised=False)
    assert (note.status, "OTHER BITS" in note.found) == ("note", True)


def test_links_are_timed_between_eight_devices(monkeypatch):
    monkeypatch.setattr(speed, "_CALL_S", 0.0)
    monkeypatch.setattr(speed, "_REPEATS", 1)
    config = tiny.config_of("divisible")
    results = list(speed.check_links(make_mesh(config, tp=8)))
    assert [result.what for result in results] == ["all-reduce over 8", "all-gather over 8"]
    assert all(result.figures["latency_s"] > 0 and result.figures["bytes_per_s"] > 0 for result in results)
    (alone,) = speed.check_links(make_mesh(config, tp=1))
    assert alone.found == "nothing to send"


def test_a_device_of_a_known_kind_must_reach_its_public_figures(monkeypatch):
    assert public_peaks("NVIDIA H100 80GB HBM3") == public_peaks("NVIDIA H100")
    assert public_peaks("NVIDIA H100 PCIe") != public_peaks("NVIDIA H100")
    v6e = public_peaks("TPU v6 lite")
    assert v6e is not None
    assert public_peaks("cpu") is None
    monkeypatch.setattr(speed, "memory_rate", lambda *_: 0.9 * v6e.hbm_bytes_per_s)
    monkeypatch.setattr(speed, "own_product_rate", lambda *_: 0.3 * v6e.flops_per_s)
    monkeypatch.setattr(speed, "product_rate", lambda *_: 0.3 * v6e.flops_per_s)
    monkeypatch.setattr(speed, "public_peaks", lambda _: v6e)
    reached: dict[str, float] = {}
    memory, products = speed.check_speed(one_device(), reached)
    assert (memory.status, products.status) == ("holds", "fails")
    assert "90%" in memory.found
    assert reached["flops_per_s"] == 0.3 * v6e.flops_per_s


def test_a_step_and_a_chunk_are_measured_beside_the_planner(monkeypatch):
    monkeypatch.setattr(steps, "_REPEATS", 1)
    config, reached = model.SMALL.cut_to(1), {"bytes_per_s": 1e10, "flops_per_s": 1e11}
    mesh = make_mesh(config, tp=4)
    assert steps.planned(config, mesh, 4, 128, 128, 16) is None, "a CPU is in no plan"
    monkeypatch.setitem(steps.DEVICE_KINDS, mesh.devices.flat[0].device_kind, "v6e")
    planner = steps.Planner(config, mesh)
    results = list(steps.check_steps("small", config, mesh, reached, planner))
    planner.close()
    assert [result.figures["seconds"] > 0 for result in results] == [True, True]
    assert status_of(results) == ["fails"] * 2, "and is no v6e"
    assert all("v6e:2x2" in result.expected for result in results)


def test_a_model_is_cut_to_what_there_is_room_for():
    assert model.chosen("cpu", None, 1)[1] is model.SMALL
    assert model.chosen("tpu", 32 * 2**30, 1)[1] is model.LLAMA_8B
    assert model.chosen("tpu", 16 * 2**30, 1)[1] is model.LLAMA_1B
    name, config = model.fitting("mine", model.LLAMA_8B, 8e9)
    assert 1 < config.num_layers < 32
    assert name == f"mine, cut to {config.num_layers} of 32 layers"
    assert model._bytes(config) <= 8e9 < model._bytes(model.LLAMA_8B.cut_to(config.num_layers + 1))


def test_the_table_names_what_fails_and_the_code_is_1(monkeypatch, capsys):
    def broken() -> Any:
        yield Result("attention", "decode | one", "fails", "off by nan")
        raise RuntimeError("out of\nmemory")

    good = Result("products", "int8", "holds", "off by 0")

    def check(name: str, config: Any, say: Any) -> list[Result]:
        parts = [("attention", broken), ("products", lambda: iter([good]))]
        return collected(parts if failing else parts[1:], say)

    monkeypatch.setattr(check_cli, "check", check)
    monkeypatch.setattr(check_cli, "use_compilation_cache", lambda _: None)
    monkeypatch.setattr("jaxllama.llama.check.result.BUDGET_S", TIMEOUT_S)
    failing = True
    assert cli.main(["check"]) == 1
    out, err = capsys.readouterr()
    assert "| **FAILS** | attention | decode \\| one | off by nan |  |" in out
    assert "| **FAILS** | attention | could not be run | RuntimeError: out of memory |  |" in out
    assert out.endswith("1 hold, 2 do not, 0 notes.\n")
    assert "fails  decode | one" in err
    failing = False
    assert cli.main(["check", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["results"] == [
        {"part": "products", "what": "int8", "status": "holds", "found": "off by 0", "expected": "", "figures": {}}
    ]
    assert found["versions"]["jax"] == jax.__version__
    assert found["num_devices"] == jax.device_count()
    assert "| ok | products |" in as_markdown(found, [good], 1.0)


def test_what_has_not_begun_in_time_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr("jaxllama.llama.check.result.BUDGET_S", -1.0)
    (result,) = collected([("model", lambda: 1 / 0)], lambda _: None)
    assert (result.part, result.status, result.what) == ("model", "note", "left out")


def test_the_rest_of_a_part_that_takes_too_long_is_left_out_and_said(monkeypatch):
    def slow() -> Any:
        monkeypatch.setattr("jaxllama.llama.check.result.BUDGET_S", -1.0)
        yield Result("bits", "alone", "holds", "the same")
        pytest.fail("went on")

    results = collected([("bits", slow), ("more", lambda: 1 / 0)], lambda _: None)
    assert [(result.part, result.status) for result in results] == [
        ("bits", "holds"),
        ("bits", "note"),
        ("more", "note"),
    ]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("tp", [1, 8])
def test_bits_hold_on_a_cpu(tp):
    assert "fails" not in status_of(bits.check_bits(model.SMALL, make_mesh(model.SMALL, tp=tp)))
