"""One request, one answer, to the last bit: alone, in company, from the cache, set aside, or as one of four choices."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collector import Collector, assert_idle, held, watch_saved_pages

import jaxllama
from jaxllama import EngineOptions, Llama, SamplingParams, make_mesh
from jaxllama.decode.state import Chunk, Place
from jaxllama.engine import engine
from jaxllama.engine.calls import Prefill
from jaxllama.engine.device import Device
from jaxllama.model import native
from jaxllama.model.cache import read_pages
from jaxllama.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.optimized

MODEL = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct"
NUM_REQUESTS = 40
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="through XLA these programs differ in bits")
TIMEOUT_S = 600.0
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 1.0},
    {"temperature": 1.6, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 12, "min_p": 0.01},
    {"temperature": 1.0, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 0.7, "logit_bias": {5: 2.0, 17: -4.0, 100: 1.0}},
    {"temperature": 1.0, "stop_token_ids": (7,), "logit_bias": {7: 100.0}, "min_tokens": 4},
    {"temperature": 0, "logprobs": None},
    {"temperature": 1.2, "logprobs": 20},
]
type Request = tuple[list[int], SamplingParams]
type Outcome = tuple[list[int], Any, str | None]


def varied_requests(vocab_size: int, longest: int) -> list[Request]:
    """Prompts of all lengths, half of which begin like others; greedy and sampled, with and without everything."""
    rng = random.Random(3)
    stems = [[rng.randrange(vocab_size) for _ in range(longest)] for _ in range(3)]
    requests = []
    for i in range(NUM_REQUESTS):
        length = rng.choice([1, 2, longest, rng.randrange(1, longest), rng.randrange(1, longest)])
        stem = stems[i % 3][: length * rng.randrange(3) // 2]
        prompt = [*stem, *(rng.randrange(vocab_size) for _ in range(length - len(stem)))]
        values = {"logprobs": 3, "ignore_eos": True, "seed": i, "max_tokens": rng.choice([1, 7, 20, 40])}
        requests.append((prompt, SamplingParams(**values | KINDS[i % len(KINDS)])))
    return requests


def make_model(
    name: str, dtype: str, options: EngineOptions, tp: int = 1, quantize: str | None = None, data: int = 1
) -> Llama:
    """A tiny model with a head of its own: a tied random one says its last token again and again."""
    weights = dict(tiny.weights_of(name))
    head = np.random.default_rng(5).normal(0, 0.1, weights["model.embed_tokens.weight"].shape)
    weights["lm_head.weight"] = head.astype(np.float32)
    return tiny.make_llama(
        name,
        tp=tp,
        data=data,
        dtype=jnp.dtype(dtype),
        quantize=quantize,
        options=options,
        weights=weights,
        tie_word_embeddings=False,
    )


def submit(llama: Llama, request: Request, scope: str) -> Collector:
    return Collector(llama.engine, *request, cache_scope=scope)


def outcome(done: Collector) -> Outcome:
    done.wait(TIMEOUT_S)
    return done.tokens, done.logprobs, done.finish_reason


def alone(llama: Llama, requests: list[Request]) -> list[Outcome]:
    """One after another, nothing in the cache: the measure of all others."""
    got = [submit(llama, request, f"alone {i}").wait(TIMEOUT_S) for i, request in enumerate(requests)]
    assert {done.request.num_cached_tokens for done in got} == {0}
    return [outcome(done) for done in got]


def together(llama: Llama, requests: list[Request]) -> list[Outcome]:
    """As many rows as there are, the rest behind them."""
    with held(llama.engine):
        got = [submit(llama, request, f"together {i}") for i, request in enumerate(requests)]
    return [outcome(done) for done in got]


def from_the_cache(llama: Llama, requests: list[Request]) -> list[Outcome]:
    """In another order, after all of them have run in the same scope, in yet another order."""
    for i in random.Random(1).sample(range(NUM_REQUESTS), NUM_REQUESTS):
        submit(llama, requests[i], "shared").wait(TIMEOUT_S)
    order = random.Random(2).sample(range(NUM_REQUESTS), NUM_REQUESTS)
    with held(llama.engine):
        got = {i: submit(llama, requests[i], "shared") for i in order}
    outcomes = [outcome(got[i]) for i in range(NUM_REQUESTS)]
    for i, (prompt, _) in enumerate(requests if llama.engine.sizes.num_shards == 1 else []):
        least = 0.4 * len(prompt) if len(prompt) > 2 * llama.engine.chunk_sizes[0] else 0
        assert (got[i].request.num_cached_tokens or 0) >= least, f"request {i} found nothing"
    return outcomes


def as_first_of_four(llama: Llama, requests: list[Request]) -> list[Outcome]:
    """Each with three others of the same prompt, which hold the pages that the first one fills."""
    got = []
    with held(llama.engine):
        for i, (prompt, params) in enumerate(requests):
            seeds = [params.seed, *(1000 + 3 * i + choice for choice in range(3))]
            choices = [(prompt, dataclasses.replace(params, seed=seed)) for seed in seeds]
            got.append([submit(llama, choice, f"choices {i}") for choice in choices])
    outcomes = [[outcome(done) for done in choices] for choices in got]
    for (prompt, _), choices in zip(requests, got, strict=True):
        cached = [done.request.num_cached_tokens or 0 for done in choices]
        assert cached[0] == 0
        if len(prompt) > 2 * llama.engine.chunk_sizes[0] and llama.engine.sizes.num_shards == 1:
            assert min(cached[1:]) >= 0.4 * len(prompt)
    return [choices[0] for choices in outcomes]


def set_aside(llama: Llama, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """So few pages that rows are set aside again and again, and single steps."""
    saved = watch_saved_pages(monkeypatch)
    with held(llama.engine):
        got = [submit(llama, request, "shared") for request in requests]
    outcomes = [outcome(done) for done in got]
    assert len(saved) >= 3, "hardly any was set aside"
    assert_idle(llama.engine)
    return outcomes


def assert_same(got: list[Outcome], want: list[Outcome], how: str) -> None:
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one == other, f"request {i} {how}"


def assert_all_mixtures_agree(
    model: Llama, small: Llama, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = alone(model, requests)
    assert {reason for *_, reason in want} == {"stop", "length"}
    assert_same(together(model, requests), want, "together with others")
    assert_same(from_the_cache(model, requests), want, "from the cache")
    assert_same(as_first_of_four(model, requests), want, "as the first of four choices")
    assert_same(set_aside(small, requests, monkeypatch), want, "set aside and brought back")
    assert_idle(model.engine)


TINY = dataclasses.replace(tiny.SMALL, max_rows=32, max_context=136, num_pages=32 * 34 + 1)
TINY_AND_FEW_PAGES = dataclasses.replace(TINY, max_rows=6, num_pages=36, dispatch_s=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype", "quantize"),
    [
        ("smollm2_like", "bfloat16", None, None),
        ("divisible", "float32", None, None),
        ("divisible", "bfloat16", "int8", None),
        ("smollm2_like", "float32", None, "int8"),
    ],
)
def test_a_request_s_bits_are_its_own(name, dtype, kv_dtype, quantize, monkeypatch):
    """40 requests in five mixtures. In float32 XLA's programs differ: pages are found under their program's name."""
    requests = varied_requests(tiny.config_of(name).vocab_size, 96)
    models = []
    for options in (TINY, TINY_AND_FEW_PAGES):
        options = dataclasses.replace(options, kv_dtype=kv_dtype)
        models.append(make_model(name, dtype, options, quantize=quantize))
    with models[0], models[1]:
        assert models[0].engine.platform.programs_agree == (dtype == "bfloat16" or native.is_available())
        assert_all_mixtures_agree(models[0], models[1], requests, monkeypatch)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype", "quantize", "data", "tp"),
    [
        ("divisible", "float32", None, None, 2, 2),
        ("smollm2_like", "bfloat16", "int8", "int8", 2, 1),
        ("divisible", "float32", "int8", None, 1, 8),
    ],
)
def test_a_request_s_bits_are_its_own_on_a_mesh(name, dtype, kv_dtype, quantize, data, tp, monkeypatch):
    requests = varied_requests(tiny.config_of(name).vocab_size, 96)
    models = []
    for options in (TINY, TINY_AND_FEW_PAGES):
        options = dataclasses.replace(options, kv_dtype=kv_dtype)
        models.append(make_model(name, dtype, options, tp=tp, data=data, quantize=quantize))
    with models[0], models[1]:
        assert models[0].engine.platform.programs_agree
        assert_all_mixtures_agree(models[0], models[1], requests, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("smollm2_like", "bfloat16"), ("divisible", "float32")])
def test_a_request_s_bits_are_its_own_without_the_cpu_s_kernels(name, dtype, monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    test_a_request_s_bits_are_its_own(name, dtype, None, None, monkeypatch)


@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype", "data", "tp"),
    [
        ("smollm2_like", "float32", None, 2, 2),
        pytest.param("divisible", "bfloat16", "int8", 2, 1, marks=pytest.mark.slow),
        pytest.param("smollm2_like", "float32", None, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_request_s_bits_are_its_own_where_chunks_share_a_program(name, dtype, kv_dtype, data, tp, monkeypatch):
    """Three chunks of each group of `data` in one call, which are of any requests, or of one; and `rep` splits rows."""
    # 24 tokens of a program, whatever the weights' bytes; the platform counts them for two.
    shared = 24 * 2 // jnp.dtype(dtype).itemsize
    sharing = functools.partial(dataclasses.replace, shared_tokens=shared, programs_agree=False, min_rows=2)
    describe = engine.describe_checked
    monkeypatch.setattr(engine, "describe_checked", lambda *args: sharing(describe(*args)))
    shapes = watch_chunks(monkeypatch)
    requests = varied_requests(tiny.config_of(name).vocab_size, 96)
    models = []
    for num_pages in (TINY.num_pages, TINY_AND_FEW_PAGES.num_pages):  # and as many rows: here another number of them
        options = dataclasses.replace(TINY, kv_dtype=kv_dtype, num_pages=num_pages, dispatch_s=1e-6)  # has other bits
        models.append(make_model(name, dtype, options, tp=tp, data=data))
    with models[0], models[1]:
        assert models[0].engine.platform.num_groups == data
        assert_all_mixtures_agree(models[0], models[1], requests, monkeypatch)
    assert {shape for shape, _ in shapes} == {(3 * data, 8)} | {(data, 32) if data > 1 else (32,)}
    assert {num for shape, num in shapes if shape == (3 * data, 8)} == set(range(1, 3 * data + 1))


def watch_chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Of each call of prefill the shape, and how many of its chunks have tokens."""
    seen: list[tuple[tuple[int, ...], int]] = []
    run = Device.run

    def spied(self: Device, call: Any) -> Any:
        if isinstance(call, Prefill):
            seen.append((call.chunk.tokens.shape, int(np.sum(call.chunk.num_tokens > 0))))
        return run(self, call)

    monkeypatch.setattr(Device, "run", spied)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_default_model_s_bits_are_the_request_s_own(monkeypatch):
    options = EngineOptions(max_rows=32, max_context=256)
    few = dataclasses.replace(options, max_rows=8, num_pages=22)
    mesh = make_mesh(Checkpoint.open(MODEL).config, tp=1)
    with jaxllama.load(MODEL, mesh, options=options) as model, jaxllama.load(MODEL, mesh, options=few) as small:
        model.engine.warm_up()
        assert model.engine.platform.programs_agree
        requests = varied_requests(model.config.vocab_size, 200)
        assert_all_mixtures_agree(model, small, requests, monkeypatch)


# ---- What the prefix cache rests on ----


@pytest.fixture(
    params=[
        ("smollm2_like", "bfloat16", 1),
        ("divisible", "bfloat16", 2),
        ("divisible", "bfloat16", 8),
        pytest.param(("divisible", "float32", 8), marks=needs_kernels),
    ]
)
def agreeing(request: pytest.FixtureRequest) -> Iterator[Llama]:
    options = dataclasses.replace(TINY, max_rows=4, num_pages=200, chunk_sizes=(8, 32, 96))
    name, dtype, tp = request.param
    with make_model(name, dtype, options, tp=tp) as llama:
        assert llama.engine.platform.programs_agree
        yield llama


def kv_of(llama: Llama, pages: list[int], num_tokens: int) -> list[np.ndarray]:
    """The keys and values in `pages`, by layer and token."""
    device = llama.engine._device
    pool, index = device._get_state().pool, np.array(pages, np.int32)
    copy = read_pages(pool, index, np.int32(0), num_layers=llama.config.num_layers)
    kv = np.asarray(copy.pages.astype(jnp.float32))
    return [layer.reshape(-1, *kv.shape[2:])[:num_tokens] for layer in np.split(kv, llama.config.num_layers)]


def test_programs_agree_where_they_are_said_to(agreeing: Llama):
    """Keys and values of 120 tokens: decoded, in chunks of every size, from other starts. All to the last bit."""
    llama, config = agreeing, agreeing.config
    device, first = llama.engine._device, tiny.prompt_of("divisible", 20)
    sampled = SamplingParams(temperature=1, seed=1, ignore_eos=True, max_tokens=101)
    generated = submit(llama, (first, sampled), "").wait(TIMEOUT_S).tokens
    ids = [*first, *generated][:120]
    assert_idle(llama.engine)
    # The answer's pages are still there, under their names.
    keys = llama.engine._plan.page_keys(b"", ids)
    found = llama.engine._scheduler.pools[0].find(keys)
    assert len(found) == 30
    want = kv_of(llama, found, 120)
    for cuts in ([8] * 15, [32] * 4, [96] * 2, [8, 96, 32], [32, 8, 8, 96]):
        table = np.zeros(llama.engine.sizes.table_width, np.int32)
        table[:30] = range(199, 169, -1)
        start = 0
        for size in cuts:
            num = min(size, 120 - start)
            tokens = np.zeros(size, np.int32)
            tokens[:num] = ids[start : start + num]
            chunk = Chunk(tokens, np.int32(start), np.int32(num))
            device.run(Prefill(Place(table, np.int32(0)), chunk))
            start += num
        assert start == 120
        for layer, (got, decoded) in enumerate(zip(kv_of(llama, table[:30].tolist(), 120), want, strict=True)):
            np.testing.assert_array_equal(got, decoded, err_msg=f"layer {layer} of {config.num_layers}, chunks {cuts}")


# ---- What callers see of it ----


def turn(llama: Llama, prompt: list[int], scope: str = "", num_tokens: int = 30) -> Collector:
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)
    return submit(llama, (prompt, params), scope).wait(TIMEOUT_S)


def test_a_second_turn_prefills_only_what_is_new(agreeing: Llama):
    first = turn(agreeing, tiny.prompt_of("divisible", 41))
    conversation = [*tiny.prompt_of("divisible", 41), *first.tokens]
    second = turn(agreeing, [*conversation, 1, 2, 3])
    # All but the last token of the answer went through the model; whole pages of four can be found.
    assert second.request.num_cached_tokens == (len(conversation) - 1) // 4 * 4
    stats = agreeing.engine.stats()
    assert stats.num_prompt_tokens == 41 + len(conversation) + 3
    assert stats.num_prompt_tokens_cached == second.request.num_cached_tokens
    assert stats.num_cached_pages > 0
    assert stats.num_pages_used == 0


def test_another_scope_finds_nothing(agreeing: Llama):
    prompt = tiny.prompt_of("divisible", 60)
    for scope, cached in (("a", 0), ("b", 0), ("a", 56), ("", 0)):
        assert turn(agreeing, prompt, scope).request.num_cached_tokens == cached
