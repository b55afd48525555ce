"""Sampling does what `SamplingParams` says: each step against its NumPy twin, draws against the exact distribution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
import tiny

from jaxllama import SamplingParams
from jaxllama.decode.sampling import (
    argmax,
    argmax_in_two,
    argmax_of_pairs,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
    top_logprobs,
)
from jaxllama.decode.state import row_state

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[2] / "golden"
VOCAB = 257  # no multiple of any block
EOS = (7, 200)


@dataclass(frozen=True)
class Row:
    """One row to sample from: what the device and the reference must agree on."""

    logits: np.ndarray
    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    seed: int = 0
    eos: tuple[int, ...] = ()
    active: bool = True

    @property
    def distribution(self) -> np.ndarray:
        """Float64 probabilities."""
        return reference.distribution(self.logits, self.params, self.prompt, self.output, self.eos)


@dataclass(frozen=True)
class Drawn:
    tokens: np.ndarray
    is_finite: np.ndarray = field(repr=False)


_sample = jax.jit(sample)


def sample_rows(rows: Sequence[Row], *, repeat: int = 1, seeds: Any = None, positions: Any = None) -> Drawn:
    """Samples all rows in one batch. `repeat` makes copies of a row, which `seeds` and `positions` tell apart."""
    vocab = len(rows[0].logits)
    states = []
    for row in rows:
        config = dataclasses.replace(tiny.config_of("divisible"), vocab_size=vocab, eos_token_ids=row.eos)
        states.append(
            row_state(config, row.params, prompt=[*row.prompt], generated=[*row.output], remaining=9, seed=row.seed)
        )
    stacked = jax.tree.map(lambda *leaves: np.repeat(np.stack(leaves), repeat, axis=0), *states)
    sampling = stacked.sampling
    if seeds is not None:
        seeds = np.asarray(seeds, np.uint64)
        words = np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1)
        sampling = sampling._replace(seed=words.astype(np.uint32))
    at = np.asarray(stacked.length, np.int32) + 1 if positions is None else np.asarray(positions, np.int32)
    result = _sample(
        np.repeat(np.stack([row.logits for row in rows]).astype(np.float32), repeat, axis=0),
        sampling,
        generated_counts=stacked.generated_counts,
        prompt_mask=stacked.prompt_mask,
        suppress_stops=np.asarray(stacked.min_remaining) > 0,
        positions=at,
        active=np.repeat([row.active for row in rows], repeat),
        mask_index=np.zeros(len(at), np.int32),
    )
    return Drawn(np.asarray(result.tokens), np.asarray(result.is_finite))


def random_logits(seed: int, vocab: int = VOCAB, sharpness: float = 3.0) -> np.ndarray:
    return (np.random.default_rng([11, seed]).standard_normal(vocab) * sharpness).astype(np.float32)


def adversarial_logits(vocab: int = VOCAB) -> np.ndarray:
    """Rows `[n, vocab]` on which thresholds, ties and overflows go wrong if they can."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(vocab) * 3
    flat = np.zeros(vocab)
    one_hot = np.full(vocab, -50.0)
    one_hot[vocab // 2] = 50.0
    only_one = np.full(vocab, -np.inf)
    only_one[vocab - 1] = -3.0
    two = np.full(vocab, -np.inf)
    two[[0, vocab - 1]] = 1.0
    masked = np.where(rng.random(vocab) < 0.9, -np.inf, base)
    ties = np.round(base)
    negative = base - 1000
    huge = base * 1e30
    tiny_steps = 1 + np.arange(vocab) * 2.0**-23
    signed_zeros = np.where(rng.random(vocab) < 0.5, 0.0, -0.0)
    # Not yet denormal: those the hardware takes for zero.
    small = base * 1e-33
    last_is_best = np.sort(base)
    geometric = np.log(0.5) * np.arange(vocab)
    rows = [base, flat, one_hot, only_one, two, masked, ties, negative, huge, tiny_steps, signed_zeros]
    rows += [last_is_best, last_is_best[::-1], geometric, *(random_logits(i, vocab, 0.3 + i) for i in range(6)), small]
    return np.stack(rows).astype(np.float32)


def kept(logits: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(row > -np.inf) for row in np.asarray(logits)]


def assert_kept(got: Any, want: np.ndarray, logits: np.ndarray, doubtful: np.ndarray | None = None) -> None:
    """The same tokens are kept, with unchanged logits. Where `doubtful`, rounding may decide."""
    got = np.asarray(got)
    for row in range(len(want)):
        difference = (got[row] > -np.inf) ^ (want[row] > -np.inf)
        if doubtful is not None:
            difference &= ~doubtful[row]
        assert not difference.any(), f"row {row}: {np.flatnonzero(difference)}"
    np.testing.assert_array_equal(got[got > -np.inf], logits[got > -np.inf])


# ---- Filters against their twins ----


@pytest.mark.parametrize("vocab", [VOCAB, 128, 100])
@pytest.mark.parametrize("top_k", [-1, 0, 1, 2, 3, 20, 99, 100, 128, 256, 257, 999])
def test_top_k_keeps_what_its_twin_keeps(top_k, vocab):
    logits = adversarial_logits(vocab)
    want = np.stack([reference.keep_top_k(row.astype(np.float64), top_k) for row in logits])
    got = jax.jit(keep_top_k)(logits, np.full(len(logits), top_k, np.int32))
    assert_kept(got, want, logits)


@pytest.mark.parametrize("vocab", [VOCAB, 128])
@pytest.mark.parametrize("top_p", [1e-6, 0.05, 0.31, 0.5, 0.9, 0.95, 0.999, 1.0])
def test_top_p_keeps_what_its_twin_keeps(top_p, vocab):
    # In the last row the twin's probabilities tie where logits do not.
    logits = adversarial_logits(vocab)[:-1]
    want = np.stack([reference.keep_top_p(row.astype(np.float64), np.float32(top_p)) for row in logits])
    got = jax.jit(keep_top_p)(logits, np.full(len(logits), top_p, np.float32))
    assert_kept(got, want, logits, doubtful=np.stack([_top_p_is_close(row, top_p) for row in logits]))


def _top_p_is_close(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Tokens for which the mass above them is `top_p` within float32's rounding of a sum."""
    probabilities = reference.softmax(logits.astype(np.float64))
    above = np.array([probabilities[probabilities > p].sum() for p in probabilities])
    return np.abs(above - top_p) < 3e-7


def test_few_top_p_cases_are_left_to_rounding():
    rows = [row for row in adversarial_logits()[:-1] if np.isfinite(row).all()]
    close = [_top_p_is_close(row, top_p).mean() for row in rows for top_p in (1e-6, 0.05, 0.31, 0.5, 0.9, 0.95)]
    assert np.mean(close) < 0.02


@pytest.mark.parametrize("vocab", [VOCAB, 128])
@pytest.mark.parametrize("min_p", [1e-6, 0.01, 0.05, 0.3, 0.77, 1.0])
def test_min_p_keeps_what_its_twin_keeps(min_p, vocab):
    logits = adversarial_logits(vocab)
    want = np.stack([reference.keep_min_p(row.astype(np.float64), np.float32(min_p)) for row in logits])
    got = jax.jit(keep_min_p)(logits, np.full(len(logits), min_p, np.float32))
    gap = logits.astype(np.float64) - logits.max(axis=1, keepdims=True) - np.log(min_p)
    # One unit in the last place of the threshold.
    doubtful = np.abs(gap) <= 2e-7 * np.maximum(1, np.abs(logits.max(axis=1, keepdims=True)))
    doubtful &= logits < logits.max(axis=1, keepdims=True)
    assert_kept(got, want, logits, doubtful)


def test_each_row_has_its_own_filter():
    logits = np.tile(random_logits(1), (5, 1))
    got = kept(keep_top_k(logits, np.array([1, 0, 20, -1, 3], np.int32)))
    assert [len(row) for row in got] == [1, VOCAB, 20, VOCAB, 3]
    got = kept(keep_top_p(logits, np.array([0.01, 1, 0.5, 0.9, 0.99], np.float32)))
    sizes = [len(row) for row in got]
    assert sizes[0] == 1 < sizes[2] < sizes[3] < sizes[4] < sizes[1] == VOCAB
    got = kept(keep_min_p(logits, np.array([1, 0, 0.5, 0.1, 0.01], np.float32)))
    assert len(got[0]) == 1
    assert len(got[1]) == VOCAB


FILTER_CASES = ["top_k_1", "top_k_20", "top_k_300", "top_p_0.05", "top_p_0.9", "min_p_0.02", "min_p_1.0"]


@pytest.mark.parametrize("case", FILTER_CASES)
def test_filters_agree_with_transformers(case):
    golden = np.load(GOLDEN / "filters.npz")
    name, value = case.rsplit("_", 1)
    keep, dtype = {"top_k": (keep_top_k, int), "top_p": (keep_top_p, float), "min_p": (keep_min_p, float)}[name]
    # transformers' top-p cuts between equal logits in the order of its sort; rows 0 and 1 are ties.
    first = 2 if name == "top_p" else 0
    got = keep(golden["logits"], np.full(8, dtype(value), np.int32 if dtype is int else np.float32))
    for ours, theirs in zip(kept(got)[first:], kept(golden[case])[first:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---- Greedy ----


GREEDY = SamplingParams(temperature=0)


def test_greedy_takes_the_first_of_the_largest():
    logits = adversarial_logits()
    drawn = sample_rows([Row(row, GREEDY) for row in logits])
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(axis=1))
    np.testing.assert_array_equal(argmax(logits), logits.argmax(axis=1))
    assert len(np.flatnonzero(logits[1] == logits[1].max())) == VOCAB
    assert drawn.tokens[1] == 0


@pytest.mark.parametrize("find", [argmax_of_pairs, argmax_in_two])
def test_the_argmax_of_every_platform_is_the_first_of_the_largest(find):
    logits = adversarial_logits()
    neighbours = np.zeros((2, VOCAB), np.float32)
    neighbours[0, [5, 200]] = 1, np.nextafter(np.float32(1), np.float32(2))  # one in bfloat16
    neighbours[1] = -np.inf
    logits = np.concatenate((logits, neighbours))
    np.testing.assert_array_equal(jax.jit(find)(logits), logits.argmax(axis=1))
    logits[:, 7] = np.nan
    assert np.all((found := np.asarray(jax.jit(find)(logits))) >= 0)
    assert np.all(found < VOCAB)


PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "repetition_below_1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "presence_negative": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.9},
    "frequency_negative": {"frequency_penalty": -0.7},
    "bias": {"logit_bias": {3: 5.5, 9: -100.0, 256: 2.25, 0: 100.0}},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": (3, 9, 11)},
    "all": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 3.0, 8: 4.0},
        "min_tokens": 4,
        "stop_token_ids": (2,),
    },
}
PROMPT, OUTPUT = (3, 9, 9, 40, 256, 3), (9, 11, 11, 60)


@pytest.mark.parametrize("name", PENALTIES)
def test_greedy_is_the_argmax_of_the_penalised_logits(name):
    """Over many rows, so that the penalty decides which token is the best in some of them."""
    params = SamplingParams(temperature=0, **PENALTIES[name])
    rows = [Row(random_logits(i, sharpness=1.0), params, PROMPT, OUTPUT, eos=EOS) for i in range(40)]
    # The penalised tokens compete with each other and with two free ones for the first place.
    for i, row in enumerate(rows):
        row.logits[[3, 9, 11, 60, 7, 5, 100, 101]] = row.logits.max() + np.random.default_rng(i).standard_normal(8)
        # Repetition multiplies negative logits: in every other row all are.
        row.logits[:] -= 12 * (i % 2)
    want = [int(row.distribution.argmax()) for row in rows]
    np.testing.assert_array_equal(sample_rows(rows).tokens, want)
    assert want != [int(row.logits.argmax()) for row in rows]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_agrees_with_transformers(penalty):
    """The golden is of logits, sampling gives tokens: bias each token to the top in turn of its golden logit."""
    golden = np.load(GOLDEN / "filters.npz")
    rows = []
    for logits, ids in zip(golden["logits"], golden["ids"], strict=True):
        prompt, output = np.split(ids, [int(golden["num_prompt"])])
        params = SamplingParams(temperature=0, repetition_penalty=penalty)
        rows.append(Row(logits, params, tuple(prompt.tolist()), tuple(output.tolist())))
    want = golden[f"repetition_penalty_{penalty}"]
    np.testing.assert_array_equal(sample_rows(rows).tokens, want.argmax(axis=1))


def test_the_whole_pipeline_agrees_with_transformers():
    """Every token that transformers keeps is drawn, with its probability, and no other."""
    golden = np.load(GOLDEN / "filters.npz")
    params = SamplingParams(
        temperature=0.8, top_k=30, top_p=0.85, min_p=0.05, repetition_penalty=1.2, min_tokens=13, max_tokens=20
    )
    eos = (int(golden["eos"]),)
    for index in range(2, 8):
        prompt, output = np.split(golden["ids"][index], [int(golden["num_prompt"])])
        row = Row(golden["logits"][index], params, tuple(prompt.tolist()), tuple(output.tolist()), eos=eos)
        want = reference.softmax(golden["all"][index].astype(np.float64))
        assert_draws(row, want, num=4000)


# ---- Draws ----


def assert_draws(row: Row, want: np.ndarray, num: int = 20_000) -> None:
    """Draws, half of one seed at many positions and half of many seeds at one position, come from `want`."""
    half = num // 2
    seeds = np.concatenate([np.full(half, 1234567890123), np.random.default_rng(0).integers(0, 2**63, half)])
    positions = np.concatenate([np.arange(half), np.full(half, 77)])
    tokens = sample_rows([row], repeat=num, seeds=seeds, positions=positions).tokens
    counts = np.bincount(tokens, minlength=len(want))
    assert counts[want == 0].sum() == 0, f"drew masked tokens {np.flatnonzero((counts > 0) & (want == 0))}"
    for part in (tokens[:half], tokens[half:]):
        assert p_value(np.bincount(part, minlength=len(want)), want) > 1e-4


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of Pearson's chi-square, rare tokens pooled so that every bin expects at least five."""
    order = np.argsort(probabilities)
    expected, observed = probabilities[order] * counts.sum(), counts[order]
    bins: list[list[float]] = [[0.0, 0.0]]
    for e, o in zip(expected, observed, strict=True):
        bins[-1][0] += e
        bins[-1][1] += o
        if bins[-1][0] >= 5:
            bins.append([0.0, 0.0])
    left = bins.pop()
    if not bins:
        return 1.0
    bins[-1] = [bins[-1][0] + left[0], bins[-1][1] + left[1]]
    if len(bins) == 1:
        return 1.0
    e, o = np.array(bins).T
    return float(scipy.stats.chisquare(o, e * o.sum() / e.sum()).pvalue)


DRAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8, "temperature": 1.4},
    "min_p": {"min_p": 0.08},
    "all_filters": {"temperature": 0.7, "top_k": 40, "top_p": 0.93, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "bias": {"logit_bias": {3: 4.0, 256: 5.0, 9: -100.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (3, 4)},
    "everything": PENALTIES["all"] | {"temperature": 1.2, "top_k": 60, "top_p": 0.97, "min_p": 0.01},
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_come_from_the_exact_distribution(name):
    row = Row(random_logits(5, sharpness=2.0), SamplingParams(**DRAWS[name]), PROMPT, OUTPUT, eos=EOS)
    assert_draws(row, row.distribution)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 256, 1000])
def test_draws_come_from_the_exact_distribution_at_any_vocabulary(vocab):
    row = Row(random_logits(6, vocab, sharpness=1.5), SamplingParams())
    assert_draws(row, row.distribution, num=10_000)


def test_draws_from_adversarial_logits_are_exact():
    for logits in adversarial_logits():
        row = Row(logits, SamplingParams())
        assert_draws(row, row.distribution, num=3000)


def test_the_chi_square_notices_a_wrong_temperature():
    row = Row(random_logits(5, sharpness=2.0), SamplingParams(temperature=1.05))
    wrong = Row(row.logits, SamplingParams())
    tokens = sample_rows([row], repeat=20_000, seeds=np.arange(20_000)).tokens
    assert p_value(np.bincount(tokens, minlength=VOCAB), wrong.distribution) < 1e-6


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """A token of probability 1e-4 among one that has almost all: single-precision cumulation must not lose it."""
    logits = np.full(40_000, -30.0, np.float32)
    logits[7], logits[39_999] = 0.0, np.log(1e-4)
    tokens = sample_rows([Row(logits, SamplingParams())], repeat=250, seeds=np.arange(250)).tokens
    assert set(tokens.tolist()) <= {7, 39_999}
    small = logits[[7, 39_999]]
    tokens = sample_rows([Row(small, SamplingParams())], repeat=200_000, seeds=np.arange(200_000)).tokens
    assert scipy.stats.binomtest(int((tokens == 1).sum()), 200_000, 1e-4).pvalue > 1e-4


def test_a_masked_token_is_never_drawn_where_rounding_invites_it():
    """Cumulated float32 sums rise by roundings over masked tokens; a uniform that falls there must not draw one.

    Such uniforms are one in millions, so the rows that have them and the seeds that hit them are sought first, by what
    `draw` documents: `fold_in(key(seed), position)`, two uniforms, of which the first chooses among blocks of 128.
    """
    block, num_blocks, position, num_seeds = 128, 1002, 5, 2**21
    rng = np.random.default_rng(2)
    uniforms = np.asarray(_first_uniforms(np.arange(num_seeds, dtype=np.uint32), position))
    order = np.argsort(uniforms)
    num_tried = 0
    for _ in range(8):
        logits = np.full((num_blocks, block), -np.inf, np.float32)
        alive = rng.choice(num_blocks, num_blocks // 3, replace=False)
        logits[alive, rng.integers(0, block, len(alive))] = rng.standard_normal(len(alive)) * 2
        weights = jnp.exp(logits - logits.max()).sum(axis=1)
        cumulated = np.asarray(jax.jit(jnp.cumsum)(weights))
        rises = np.flatnonzero((np.diff(cumulated) > 0) & (np.asarray(weights[1:]) == 0))
        bounds = np.stack([cumulated[rises], cumulated[rises + 1]]) / cumulated[-1]
        low, high = np.searchsorted(uniforms[order], bounds + np.array([[-2e-7], [2e-7]]))
        seeds = np.concatenate([order[a:b] for a, b in zip(low, high, strict=True)] or [order[:0]])
        num_tried += len(seeds)
        if len(seeds):
            row = Row(logits.ravel(), SamplingParams())
            at = np.full(len(seeds), position)
            tokens = sample_rows([row], repeat=len(seeds), seeds=seeds, positions=at).tokens
            masked = ~np.isfinite(logits.ravel()[np.minimum(tokens, logits.size - 1)]) | (tokens >= logits.size)
            assert not masked.any(), f"seeds {seeds[masked]} drew masked tokens {tokens[masked]}"
    assert num_tried > 20


@functools.partial(jax.jit, static_argnums=1)
def _first_uniforms(seeds: jax.Array, position: int) -> jax.Array:
    def first(seed: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), seed]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))[0]

    return jax.vmap(first)(seeds)


# ---- Seeds ----


def draw_many(seed: int, num: int = 64, first: int = 0) -> list[int]:
    """Draws of one seed at successive positions."""
    row = Row(random_logits(8, sharpness=0.5), SamplingParams())
    drawn = sample_rows([row], repeat=num, seeds=np.full(num, seed, np.uint64), positions=first + np.arange(num))
    return drawn.tokens.tolist()


def test_the_same_seed_draws_the_same_tokens():
    assert draw_many(42) == draw_many(42)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2**63 - 1), (1, 2**32 + 1), (5, 5 << 32), (2**31, 2**63 - 1)])
def test_different_seeds_draw_different_tokens(a, b):
    same = np.mean(np.array(draw_many(a)) == np.array(draw_many(b)))
    assert same < 0.2


def test_different_positions_draw_different_tokens():
    assert len(set(draw_many(3))) > 30
    assert draw_many(3, first=0)[10:] == draw_many(3, num=54, first=10)


def test_neighbouring_seeds_and_positions_are_not_correlated():
    row = Row(np.zeros(VOCAB, np.float32), SamplingParams())
    seeds, positions = (grid.ravel() for grid in np.meshgrid(np.arange(100), np.arange(100)))
    tokens = sample_rows([row], repeat=10_000, seeds=seeds, positions=positions).tokens.reshape(100, 100)
    for a, b in ((tokens[1:], tokens[:-1]), (tokens[:, 1:], tokens[:, :-1]), (tokens, tokens.T)):
        off_diagonal = ~np.eye(*a.shape, dtype=bool) if a is tokens else np.ones(a.shape, bool)
        # Uniform tokens agree by chance with probability 1 / VOCAB.
        num_same, num = int((a == b)[off_diagonal].sum()), int(off_diagonal.sum())
        assert scipy.stats.binomtest(num_same, num, 1 / VOCAB).pvalue > 1e-4


# ---- Rows do not notice each other ----


BUSY = [
    SamplingParams(**PENALTIES["all"], temperature=0),
    SamplingParams(**DRAWS["everything"]),
    SamplingParams(temperature=1.9, top_p=0.4, top_k=3, min_p=0.2),
    SamplingParams(temperature=0, logit_bias={1: -100.0, 2: 100.0}),
]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(top_k=5)])
def test_a_row_s_tokens_do_not_depend_on_its_neighbours(params):
    """Two logits one unit in the last place apart: any change of their bits changes the greedy token."""
    rows = []
    for i in range(50):
        logits = random_logits(i, sharpness=1.0)
        best = logits.max() + np.float32(1)
        logits[[20, 150]] = best, np.nextafter(best, np.float32(np.inf))
        rows.append(Row(logits, params, PROMPT, OUTPUT, seed=i, eos=EOS))
    alone = sample_rows(rows).tokens
    for busy in BUSY:
        neighbours = [Row(random_logits(99), busy, PROMPT, OUTPUT, seed=3, eos=EOS)] * 3
        together = sample_rows([*neighbours, *rows, *neighbours]).tokens[3:-3]
        np.testing.assert_array_equal(together, alone)
    if params.temperature == 0:
        assert set(alone.tolist()) == {150}


def test_rows_that_are_not_active_cost_nothing_and_change_nothing():
    rows = [Row(random_logits(i), GREEDY) for i in range(3)]
    idle = [Row(np.full(VOCAB, np.nan, np.float32), BUSY[1], PROMPT, OUTPUT, active=False)]
    np.testing.assert_array_equal(sample_rows([*idle, *rows, *idle]).tokens[1:-1], sample_rows(rows).tokens)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), BUSY[1]])
def test_only_the_row_with_bad_logits_is_flagged(params):
    rows = [Row(random_logits(i), params, seed=i) for i in range(9)]
    clean = sample_rows(rows)
    assert clean.is_finite.all()
    bad = list(rows)
    for index, poison in ((1, np.nan), (4, np.inf), (7, np.nan)):
        logits = rows[index].logits.copy()
        logits[VOCAB - 1 if index == 7 else 100] = poison
        bad[index] = dataclasses.replace(rows[index], logits=logits)
    drawn = sample_rows(bad)
    assert np.flatnonzero(~drawn.is_finite).tolist() == [1, 4, 7]
    good = [0, 2, 3, 5, 6, 8]
    np.testing.assert_array_equal(drawn.tokens[good], clean.tokens[good])


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1.2e-38, 2e-38, 1e-37, 1e-30, 1e-10, 1e-4])
def test_a_vanishing_temperature_is_greedy(temperature):
    rows = [Row(random_logits(i), SamplingParams(temperature=temperature), seed=i) for i in range(8)]
    np.testing.assert_array_equal(sample_rows(rows).tokens, [row.logits.argmax() for row in rows])


# ---- Log-probabilities ----


def test_logprobs_are_of_the_raw_logits_and_sorted():
    logits = np.stack([random_logits(i) for i in range(6)])
    tokens = np.array([0, 5, 256, 100, 7, 3], np.int32)
    got = jax.jit(top_logprobs)(logits, tokens, np.array(True))
    want = np.stack([reference.log_probabilities(row) for row in logits])
    np.testing.assert_allclose(got.chosen, want[np.arange(6), tokens], atol=1e-5)
    np.testing.assert_array_equal(got.ids, np.argsort(-logits, axis=1, kind="stable")[:, :20])
    np.testing.assert_allclose(got.values, np.take_along_axis(want, np.asarray(got.ids), axis=1), atol=1e-5)
    assert (np.diff(got.values, axis=1) <= 0).all()


def test_logprobs_fit_a_vocabulary_below_twenty():
    logits = np.stack([random_logits(i, vocab=6) for i in range(2)])
    got = top_logprobs(logits, np.array([1, 2], np.int32), np.array(True))
    assert got.ids.shape == (2, 6)
    np.testing.assert_allclose(np.exp(got.values).sum(axis=1), 1, rtol=1e-5)


def test_logprobs_of_huge_logits_stay_finite():
    logits = np.stack([random_logits(0) * 1e4, random_logits(1) - 1e6]).astype(np.float32)
    got = top_logprobs(logits, np.array([1, 2], np.int32), np.array(True))
    assert np.isfinite(got.chosen).all()
    assert np.isfinite(got.values).all()


def test_the_neutral_filters_keep_everything():
    logits = adversarial_logits()
    for keep, value in ((keep_top_k, np.int32(0)), (keep_top_p, np.float32(1)), (keep_min_p, np.float32(0))):
        np.testing.assert_array_equal(keep(logits, np.full(len(logits), value)), logits)
