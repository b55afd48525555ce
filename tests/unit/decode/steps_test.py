"""Decoding: chunks, dispatches and batches are bookkeeping that a row's output does not notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collector import Collector, held

from jaxllama import EngineOptions, Llama, SamplingParams
from jaxllama.decode.state import MAX_STEPS, Chunk, Place, insert, make_state, row_state, state_shapes, state_shardings
from jaxllama.decode.steps import decode_steps, prefill
from jaxllama.model.cache import kv_pool_shapes
from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms.cpu import PLAIN

pytestmark = pytest.mark.optimized

NAME = "divisible"
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=6)


def prompt(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt_of(NAME, length, seed)


# ---- Chunks ----


def test_every_prompt_length_agrees_with_the_reference(llama: Llama):
    """Chunks of 8 and 32 tokens, pages of 4: every length up to two chunks, 70 requests at a time."""
    prompts = [prompt(length, seed=length) for length in range(1, 71)]
    for ids, completion in zip(prompts, llama.generate(prompts, GREEDY), strict=True):
        tiny.assert_greedy(NAME, ids, completion.token_ids)


EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 34, 127, 128, 129, 130, 511, 512, 513, 514, 545, 640)


def test_prompts_at_the_edges_of_the_default_chunks_agree_with_the_reference():
    options = EngineOptions(max_rows=2, max_context=700)
    assert PLAIN.chunk_sizes == (32, 128, 512)
    with tiny.make_llama(options=options) as llama:
        prompts = [prompt(length, seed=length) for length in EDGES]
        for ids, completion in zip(prompts, llama.generate(prompts, GREEDY), strict=True):
            tiny.assert_greedy(NAME, ids, completion.token_ids)


def test_a_prompt_of_the_whole_context_but_one(llama: Llama):
    ids = prompt(llama.max_context - 1)
    completion = llama.generate(ids, GREEDY)
    assert len(completion.token_ids) == 1
    tiny.assert_greedy(NAME, ids, completion.token_ids)


# ---- Batches ----

MANY = dataclasses.replace(tiny.SMALL, max_rows=8, num_pages=8 * 24 + 1)
VARIED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": None},
    {"seed": 1},
    {"seed": 2, "temperature": 1.8},
    {"seed": 3, "top_k": 4},
    {"seed": 4, "top_p": 0.7, "min_p": 0.02},
    {"seed": 5, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0, "repetition_penalty": 0.7},
    {"seed": 6, "logit_bias": {1: 2.0, 200: -3.0}},
    {"seed": 7, "min_tokens": 30, "stop_token_ids": tuple(range(40)), "ignore_eos": False},
    {"temperature": 0, "stop_token_ids": tuple(range(0, 280, 7))},
]


@pytest.mark.parametrize(
    ("name", "dtype", "int8"),
    [(NAME, "float32", None), ("smollm2_like", "bfloat16", None), ("smollm2_like", "bfloat16", "int8")],
)
def test_a_row_is_independent_of_its_batch(name, dtype, int8):
    """Tokens and log-probabilities, bit for bit: alone, in threes, and among others that differ."""
    requests = []
    for i in range(16):
        values = {"ignore_eos": True, "logprobs": 3, "max_tokens": 10 + 2 * i} | VARIED[i % len(VARIED)]
        requests.append((tiny.prompt_of(name, 1 + 7 * i % 40, seed=i), SamplingParams(**values)))
    options = dataclasses.replace(MANY, kv_dtype=int8)
    with tiny.make_llama(name, dtype=jnp.dtype(dtype), quantize=int8, options=options) as llama:
        outcomes = {size: in_groups(llama, requests, size) for size in (1, 3, 8)}
        backwards = in_groups(llama, requests[::-1], 8)[::-1]
    for size, outcome in (outcomes | {-8: backwards}).items():
        for i in range(16):
            (tokens, logprobs), (alone_tokens, alone_logprobs) = outcome[i], outcomes[1][i]
            assert tokens == alone_tokens, f"request {i} in a batch of {size}"
            assert logprobs == alone_logprobs, f"request {i} in a batch of {size}"


def in_groups(llama: Llama, requests: list[tuple[list[int], SamplingParams]], size: int) -> list[tuple[Any, Any]]:
    """Tokens and log-probabilities of each request, `size` of them running at a time."""
    outcome = []
    for start in range(0, len(requests), size):
        with held(llama.engine):
            group = [Collector(llama.engine, ids, params) for ids, params in requests[start : start + size]]
        outcome += [(done.wait().tokens, done.logprobs) for done in group]
    return outcome


@pytest.mark.parametrize("int8", [None, "int8"])
def test_a_row_set_aside_resumes_bit_for_bit(int8):
    """What was generated comes back through prefill, in other programs than those that generated it."""
    options = dataclasses.replace(tiny.SMALL, kv_dtype=int8, num_pages=26)
    with tiny.make_llama(quantize=int8, options=options) as llama:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60, logprobs=2)
        prompts = [prompt(length, seed=length) for length in (5, 11, 20, 30)]
        # One after the other there are pages enough, and a row does not notice its batch.
        want = in_groups(llama, [(ids, params) for ids in prompts], 1)
        assert in_groups(llama, [(ids, params) for ids in prompts], 4) == want


# ---- The pure functions, as a notebook uses them ----


@dataclasses.dataclass
class Rows:
    """A model and a `DecodeState` of four rows, each with pages for a whole context."""

    llama: Llama
    state: Any

    def put(self, row: int, ids: list[int], params: SamplingParams, remaining: int = 50, generated: Any = ()) -> None:
        """Prefills and inserts a request, as the engine does."""
        config, weights, options = self.llama.config, self.llama.params, tiny.SMALL
        new = row_state(config, params, prompt=ids, generated=[*generated], remaining=remaining, seed=params.seed or 0)
        table = np.asarray(self.state.page_table)[row]
        known, size, pool = [*ids, *generated][:-1], max(options.chunk_sizes), self.state.pool
        for start in range(0, len(known), size):
            part = np.array(known[start : start + size], np.int32)
            padded = np.pad(part, (0, size - len(part)))
            chunk = Chunk(padded, np.int32(start), np.int32(len(part)))
            pool = prefill(config, weights, pool, Place(table, np.int32(0)), chunk)
        self.state = insert(self.state._replace(pool=pool), np.int32(row), new)

    def steps(self, num: int, keep: tuple[bool, ...] = (True,) * 4) -> np.ndarray:
        """Decodes at most `num` steps; tokens `[steps, 4]`."""
        self.state, out = decode_steps(
            self.llama.config, self.llama.params, self.state, np.int32(num), np.array(keep), num_rows=4
        )
        return np.asarray(out.tokens)[: int(out.num_steps)]


@pytest.fixture
def rows(llama: Llama) -> Rows:
    options, context_pages = tiny.SMALL, 24
    width = context_pages + max(options.chunk_sizes) // options.page_size
    shapes = state_shapes(
        llama.config,
        num_rows=4,
        num_pages=options.num_pages or 0,
        page_size=options.page_size,
        max_context=width * options.page_size,
        dtype=jnp.float32,
    )
    state = make_state(shapes, state_shardings(llama.config, make_mesh(llama.config, tp=1), shapes))
    table = np.zeros((4, width), np.int32)
    table[:, :context_pages] = 1 + np.random.default_rng(0).permutation(4 * context_pages).reshape(4, -1)
    state = state._replace(page_table=jax.device_put(table, state.page_table.sharding))
    return Rows(llama, state)


def test_rows_decode_what_the_reference_says(rows: Rows):
    for row, length in enumerate((1, 9, 33, 40)):
        rows.put(row, prompt(length, seed=row), GREEDY)
    tokens = rows.steps(10)
    assert tokens.shape == (10, 4)
    for row, length in enumerate((1, 9, 33, 40)):
        tiny.assert_greedy(NAME, prompt(length, seed=row), tokens[:, row].tolist())


def test_the_number_of_steps_in_a_dispatch_does_not_matter(rows: Rows):
    params = SamplingParams(seed=4, ignore_eos=True, repetition_penalty=1.2)
    rows.put(0, prompt(9), params)
    rows.put(2, prompt(5), GREEDY)
    at_once = rows.steps(12)
    rows.put(0, prompt(9), params)
    rows.put(2, prompt(5), GREEDY)
    one_by_one = np.concatenate([rows.steps(n) for n in (1, 1, 3, 7)])
    np.testing.assert_array_equal(at_once, one_by_one)
    assert (at_once[:, [1, 3]] == -1).all()


def test_rows_end_on_the_device_and_the_dispatch_with_them(rows: Rows):
    rows.put(0, prompt(9), GREEDY, remaining=3)
    rows.put(1, prompt(9), GREEDY, remaining=1)
    tokens = rows.steps(MAX_STEPS)
    assert len(tokens) == 3
    assert (tokens[:, 0] >= 0).all()
    assert tokens[0, 1] == tokens[0, 0]
    assert (tokens[1:, 1] == -1).all()
    assert rows.steps(5).shape == (0, 4)
    stop = int(tokens[1, 0])
    rows.put(0, prompt(9), dataclasses.replace(GREEDY, stop_token_ids=(stop,)))
    ended = rows.steps(MAX_STEPS)[:, 0]
    assert ended[-1] == stop
    assert len(ended) == tokens[:, 0].tolist().index(stop) + 1


def test_a_row_that_is_not_kept_stops_for_good(rows: Rows):
    rows.put(0, prompt(9), GREEDY)
    rows.put(1, prompt(4), GREEDY)
    assert (rows.steps(2, keep=(True, False, True, True))[:, 1] == -1).all()
    assert (rows.steps(2)[:, 1] == -1).all()


def test_a_row_put_back_continues_where_it_was(rows: Rows):
    params = SamplingParams(seed=9, ignore_eos=True, frequency_penalty=0.8, min_tokens=10, stop_token_ids=(1, 2, 3))
    rows.put(3, prompt(7), params)
    whole = rows.steps(14)[:, 3].tolist()
    for cut in (1, 5, 13):
        rows.put(3, prompt(7), params, generated=whole[:cut], remaining=50 - cut)
        assert rows.steps(14 - cut)[:, 3].tolist() == whole[cut:]


def test_a_step_without_work_changes_nothing(rows: Rows):
    before = jax.tree.map(np.array, rows.state)
    assert rows.steps(MAX_STEPS).shape == (0, 4)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(rows.state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_state_is_made_of_arrays_of_one_shape(llama: Llama):
    shapes = state_shapes(llama.config, num_rows=3, num_pages=5, page_size=4, max_context=10, dtype=jnp.bfloat16)
    assert shapes.pool == kv_pool_shapes(llama.config, 5, 4, jnp.bfloat16)
    assert shapes.page_table.shape == (3, 3)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(shapes.rows))
    # One row as the host makes it is the same tree, without the rows.
    one = row_state(llama.config, SamplingParams(), prompt=[1], generated=[], remaining=1, seed=0)
    for leaf, row in zip(jax.tree.leaves(shapes.rows), jax.tree.leaves(one), strict=True):
        assert (leaf.shape[1:], leaf.dtype) == (row.shape, row.dtype)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_a_seed_fills_two_words(llama: Llama, seed):
    row = row_state(llama.config, SamplingParams(), prompt=[1], generated=[], remaining=1, seed=seed)
    high, low = row.sampling.seed.tolist()
    assert (high << 32) + low == seed
