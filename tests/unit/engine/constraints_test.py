"""Constrained requests in the engine: masks hold, free tokens run on, and nobody else notices."""

from __future__ import annotations

import copy
import queue

import numpy as np
import pytest
import tiny

from jaxllama import SamplingParams, Structured
from jaxllama.decode.sampling import apply_token_mask
from jaxllama.engine.constraints import Constraints, advance
from jaxllama.engine.scheduling.request import EngineRequest
from jaxllama.errors import GrammarError, RequestError

WORDS = -(-tiny.MODELS["divisible"]["vocab_size"] // 32)


class Rule:
    """Lets `free` tokens come, then only those of `script`; remembers what came."""

    def __init__(self, script, *, free=0, halt_id=None, fails_at=None):
        self.script, self.free, self.halt_id, self.fails_at = list(script), free, halt_id, fails_at
        self.seen = []

    @property
    def num_free(self):
        return max(self.free - len(self.seen), 0)

    def mask(self):
        if len(self.seen) == self.fails_at:
            raise GrammarError("too much work")
        mask = np.zeros(WORDS, np.uint32)
        for token in self.script[len(self.seen) - self.free]:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def fork(self):
        return copy.deepcopy(self)

    def advance(self, token_id):
        self.seen.append(token_id)
        if token_id == self.halt_id:
            self.halt_id, self.free = None, len(self.seen)


def run_all(engine, *jobs):
    """The tokens and the last output of each job (prompt, params, constraint), run together."""
    inbox = queue.SimpleQueue()
    for index, (prompt, params, rule) in enumerate(jobs):
        engine.submit(prompt, params, lambda output, index=index: inbox.put((index, output)), constraint=rule)
    tokens, last = [[] for _ in jobs], {}
    while len(last) < len(jobs):
        index, output = inbox.get(timeout=120)
        tokens[index] += output.token_ids
        if output.finish_reason is not None:
            last[index] = output
    return tokens, [last[i] for i in range(len(jobs))]


PARAMS = SamplingParams(temperature=2.0, seed=5, max_tokens=12, ignore_eos=True)


def test_only_what_the_mask_allows_comes_and_neighbours_keep_their_bits(engine):
    prompt = tiny.prompt_of("divisible", 9)
    other = (
        tiny.prompt_of("divisible", 5, 1),
        SamplingParams(seed=3, max_tokens=30, ignore_eos=True, logprobs=2),
        None,
    )
    ((alone,), _) = run_all(engine, other)
    script = [{3, 40}, {279}, {0}, {31, 32, 33}] * 3
    rules = [Rule(script), Rule(script)]
    tokens, last = run_all(
        engine,
        (prompt, PARAMS, rules[0]),
        other,
        (prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), rules[1]),
    )
    for got, rule in ((tokens[0], rules[0]), (tokens[2], rules[1])):
        assert all(token in allowed for token, allowed in zip(got, script, strict=True))
        assert rule.seen == got
    assert tokens[1] == alone
    assert last[0].finish_reason == "length"


def test_free_tokens_are_those_of_a_free_request(engine):
    prompt = tiny.prompt_of("divisible", 9)
    ((free,), _) = run_all(engine, (prompt, PARAMS, None))
    for count in (1, 5, 9):
        ((got,), _) = run_all(engine, (prompt, PARAMS, Rule([{7}] * 12, free=count)))
        assert got == [*free[:count], *[7] * (12 - count)]


def test_the_device_waits_after_the_halting_id(engine):
    prompt = tiny.prompt_of("divisible", 9)
    ((free,), _) = run_all(engine, (prompt, PARAMS, None))
    at = free.index(free[4]) + 1
    rule = Rule([{7}] * 12, free=10**9, halt_id=free[4])
    ((got,), _) = run_all(engine, (prompt, PARAMS, rule))
    assert got == [*free[:at], *[7] * (12 - at)]


def test_a_constraint_that_fails_ends_its_request_alone(engine):
    prompt = tiny.prompt_of("divisible", 9)
    ((alone,), _) = run_all(engine, (prompt, PARAMS, None))
    tokens, last = run_all(engine, (prompt, PARAMS, Rule([{7}] * 12, fails_at=3)), (prompt, PARAMS, None))
    assert tokens == [[7, 7, 7], alone]
    assert last[0].finish_reason == "error"
    assert isinstance(last[0].error, GrammarError)
    assert last[1].finish_reason == "length"


def test_logprobs_do_not_know_of_the_mask(engine):
    prompt = tiny.prompt_of("divisible", 9)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=3)
    inbox = queue.SimpleQueue()
    engine.submit(prompt, params, inbox.put)
    free = inbox.get(timeout=60).logprobs[0]
    worst = next(i for i in range(200) if i not in dict(free.top))
    engine.submit(prompt, params, inbox.put, constraint=Rule([{worst}]))
    masked = inbox.get(timeout=60).logprobs[0]
    assert masked.token_id == worst
    assert masked.top == free.top
    assert masked.logprob < free.logprob


def test_structured_params_without_a_constraint_are_refused(engine):
    with pytest.raises(RequestError, match="constraint"):
        engine.submit([1], SamplingParams(structured=Structured(choice=["a"])), lambda _: None)


def test_masks_go_to_the_device_only_when_there_are_any():
    sent = []

    class Programs:
        def run(self, call):
            sent.append(call)

    request = EngineRequest([1], PARAMS, print, 1, frozenset(), 0, 0, print, row=1)
    constraints = Constraints(Programs(), (4, 1, WORDS))
    assert constraints.send_masks([request])[1] == []
    assert not sent
    request.constraint = Rule([{5}])
    constraints.send_masks([request])
    advance(request, 5)
    assert sent[0][1].tolist() == [False, True, False, False]
    assert sent[0][0][1].tolist() == [[32, *[0] * (WORDS - 1)]]
    request.constraint = None
    constraints.send_masks([request])
    constraints.send_masks([request])
    assert [is_masked.any() for _, is_masked in sent] == [True, False]


def test_no_dispatch_goes_past_the_free_tokens():
    class Request:
        constraint = None

    free, bound, masked = Request(), Request(), Request()
    bound.constraint, masked.constraint = Rule([], free=10), Rule([{1}])
    constraints = Constraints(None, (4, 1, WORDS))
    assert constraints.max_steps([free], 32, lambda _: 32) == 32
    assert constraints.max_steps([free, bound], 32, lambda _: 0) == 10
    assert constraints.max_steps([free, bound], 32, lambda _: 8) == 2
    assert constraints.max_steps([free, bound], 32, lambda _: 10) == 0
    assert constraints.max_steps([free, masked], 32, lambda _: 0) == 1
    assert constraints.max_steps([free, masked], 32, lambda _: 1) == 0
    # With speculation the device knows how far a row may go.
    assert constraints.max_steps([free, masked], 32, lambda _: 0, num_drafts=7) == 32
    assert constraints.max_steps([bound, masked], 32, lambda _: 0, num_drafts=7) == 10
    assert constraints.max_steps([free, masked], 32, lambda _: 1, num_drafts=7) == 0


@pytest.mark.parametrize("vocab", [31, 32, 33, 280])
def test_a_mask_is_bits_in_order(vocab):
    rng = np.random.default_rng(vocab)
    allowed = rng.random((3, vocab)) < 0.5
    padded = np.pad(allowed, ((0, 0), (0, -vocab % 32)), constant_values=True)
    packed = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    logits = rng.normal(size=(3, vocab)).astype(np.float32)
    is_masked = np.array([True, False, True])
    out = np.asarray(apply_token_mask(logits, packed, is_masked))
    np.testing.assert_array_equal(out, np.where(is_masked[:, None] & ~allowed, -np.inf, logits))
