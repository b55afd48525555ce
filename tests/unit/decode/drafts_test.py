"""Where drafts come from: the longest suffix that was there before, the newest first."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of

from jaxllama import SamplingParams
from jaxllama.decode.drafts import FIRST_ACCEPTANCE, SUFFIXES, Drafts, chances, learned, look_up, rates
from jaxllama.decode.state import row_state
from jaxllama.engine.scheduling.speculation import Speculation, StepTimes

NUM_DRAFTS = 5


def slow_look_up(history: list[int], start: int) -> tuple[list[int], int, bool] | None:
    """The twin of `look_up` for one row, in the words of its docstring."""
    last = len(history) - 1
    for size in sorted(SUFFIXES, reverse=True):
        suffix = history[len(history) - size :]
        places = [p for p in range(size - 1, last) if history[p - size + 1 : p + 1] == suffix]
        if not places or size > len(history):
            continue
        place = max([p for p in places if p < start] or places)
        following, repeated = history[place + 1 :], []
        while len(repeated) < NUM_DRAFTS:
            repeated += following
        return repeated[:NUM_DRAFTS], SUFFIXES.index(size), place < start
    return None


@pytest.mark.parametrize("num_ids", [2, 3, 12])
def test_drafts_follow_the_longest_suffix_the_newest_first(num_ids):
    rng = np.random.default_rng(num_ids)
    lengths = [1, 2, 3, 4, 5, *rng.integers(6, 60, 55).tolist(), 1024, 1026, 1027, 2400]
    rows = [rng.integers(0, num_ids, length).tolist() for length in lengths]
    starts = [int(rng.integers(0, length)) if row % 2 else 0 for row, length in enumerate(lengths)]
    history = np.zeros((len(rows), 2500), np.int32)
    for row, ids in enumerate(rows):
        history[row, : len(ids)] = ids
    last = np.array([len(ids) - 1 for ids in rows], np.int32)
    got = look_up(jnp.asarray(history), jnp.asarray(starts), jnp.asarray(last), NUM_DRAFTS)
    found = 0
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        want = slow_look_up(ids, start)
        assert got.num[row] == (0 if want is None else NUM_DRAFTS)
        if want is not None:
            found += 1
            assert (np.asarray(got.tokens)[row].tolist(), int(got.suffix[row]), bool(got.is_predicted[row])) == want
    assert found > 5


def test_a_prediction_is_found_from_its_first_token_on():
    prompt, prediction = [5, 6, 7, 8, 9], [20, 21, 22, 23, 24, 25]
    row = row_state(
        config_of("divisible"),
        SamplingParams(),
        prompt=prompt,
        generated=[],
        remaining=10,
        seed=0,
        history_size=64,
        prediction=prediction,
    )
    start, last = row.history_start[None], row.history_start[None] + row.length
    got = look_up(jnp.asarray(row.history[None]), jnp.asarray(start), jnp.asarray(last), NUM_DRAFTS)
    assert np.asarray(got.tokens)[0].tolist() == prediction[:NUM_DRAFTS]
    assert row.history[start[0] : last[0] + 1].tolist() == prompt


def test_a_prediction_takes_no_room_from_the_row():
    prompt = list(range(30))
    row = row_state(
        config_of("divisible"),
        SamplingParams(),
        prompt=prompt,
        generated=[],
        remaining=30,
        seed=0,
        history_size=64,
        prediction=[1] * 50,
    )
    assert int(row.history_start) + len(prompt) + 30 <= 64
    assert row.history[row.history_start :][: len(prompt)].tolist() == prompt


def depth_of(suffix: tuple[int, int], num: tuple[int, int], costs: list[float], max_tokens: int = 99) -> int:
    """Of two rows that accept none, half, or all, by their suffix."""
    drafts = Drafts(jnp.zeros((2, 4), jnp.int32), jnp.array(num), jnp.array(suffix), jnp.zeros(2, bool))
    acceptance = jnp.array([[0.0, 0.5, 1.0]] * 2)
    found = rates(drafts, chances(drafts, acceptance), jnp.array([True, True]), jnp.array(costs), max_tokens)
    return int(jnp.argmax(found))


def test_as_many_drafts_are_verified_as_are_expected_to_save_time():
    # Four sure tokens beside a row without any: six for two.
    assert depth_of((2, 0), (4, 0), [1, 2.9, 2.9, 2.9, 2.9]) == 4
    assert depth_of((2, 0), (4, 0), [1, 3.1, 3.1, 3.1, 3.1]) == 0
    assert depth_of((2, 0), (4, 0), [1, 1.1, 1.2, 2.4, 3.1]) == 2
    # 2 + 0.5 + 0.25 + 0.125 each.
    assert depth_of((1, 1), (3, 3), [1, 1.86, 1.86, 1.86, 1.86]) == 3
    assert depth_of((1, 1), (3, 3), [1, 1.89, 1.89, 1.89, 1.89]) == 0
    assert depth_of((0, 0), (4, 4), [1, 1.001, 1.001, 1.001, 1.001]) == 0
    # A text without matches, however little it costs.
    assert depth_of((2, 2), (0, 0), [1.0, 1, 1, 1, 1]) == 0


def test_no_more_tokens_are_verified_than_there_is_room_for():
    free = [1.0] * 5
    assert [depth_of((2, 2), (4, 2), free, room) for room in (2, 3, 4, 6, 7, 8)] == [0, 0, 1, 2, 3, 4]


def test_costs_lie_between_those_that_were_measured():
    times = StepTimes({1: 1.0, 4: 1.6}, {2: 1.2, 8: 2.0, 32: 8.0})
    np.testing.assert_allclose(times.costs(1, 2), [1, 1.2, 1.2 + 0.8 / 6], rtol=1e-6)
    np.testing.assert_allclose(times.costs(4, 3), [1, 2 / 1.6, 3 / 1.6, 4 / 1.6], rtol=1e-6)


def test_a_draft_costs_what_it_does_where_it_is_cheapest():
    times = StepTimes({4: 1.0}, {8: 1.5, 16: 1.9})
    speculation = Speculation(num_drafts={4: 3, 8: 0, 2: 2}, times={4: times})
    assert speculation.draft_cost(4, 4) == pytest.approx(0.3)
    assert speculation.draft_cost(8, 8) == 0
    assert speculation.draft_cost(2, 1) == pytest.approx(0.1)


def test_acceptance_follows_the_last_tokens_of_that_suffix_alone():
    acceptance = jnp.array([FIRST_ACCEPTANCE] * 2)
    for _ in range(30):
        acceptance = learned(acceptance, jnp.array([1, 2]), jnp.array([True, False]), jnp.array([True, True]))
    assert acceptance[0, 1] > 0.98
    np.testing.assert_array_equal(acceptance[0, jnp.array([0, 2])], np.float32(FIRST_ACCEPTANCE)[[0, 2]])
    np.testing.assert_array_equal(acceptance[1], np.float32(FIRST_ACCEPTANCE))
