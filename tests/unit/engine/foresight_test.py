"""What a request under a grammar is thought to say, and the masks along it."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from jaxllama.engine.scheduling.foresight import Foresight
from jaxllama.errors import GrammarError

VOCAB = 2080


def mask_of(allowed: set[int] | range) -> np.ndarray:
    bits = np.zeros(VOCAB, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


ANY = range(VOCAB)


class Rule:
    """At place i of the output `script[i]` may come, then anything.

    There is no mask at `fails_at`, and at `free_at` none is needed.
    """

    def __init__(self, script, *, fails_at=None, free_at=None):
        self.script, self.fails_at, self.free_at, self.at = script, fails_at, free_at, 0

    halt_id = None

    @property
    def num_free(self):
        return 9 if self.at == self.free_at else 0

    @property
    def allowed(self):
        return self.script[self.at] if self.at < len(self.script) else ANY

    def mask(self):
        if self.at == self.fails_at:
            raise GrammarError("too much work")
        return mask_of(self.allowed)

    def advance(self, token_id):
        assert token_id in self.allowed
        self.at += 1

    def fork(self):
        return copy.copy(self)


def path_of(foresight: Foresight) -> list[int]:
    assert not foresight.masks or len(foresight.masks) == len(foresight.drafts) + 1
    return [draft.token_id for draft in foresight.drafts]


def foresee(script, prompt=(), max_drafts=7, before=(), stop_ids=frozenset(), **how) -> Foresight:
    foresight, rule = Foresight(before, prompt, stop_ids), Rule(script, **how)
    foresight.extend(rule, [], max_drafts)
    assert rule.at == 0
    for place, mask in enumerate(foresight.masks):
        stops_before = place and foresight.drafts[place - 1].token_id in stop_ids
        rule.at = place
        assert stops_before or (mask == mask_of(rule.allowed)).all()
    return foresight


def test_one_allowed_token_is_certain():
    tokens = [0, 31, 32, 63, 2047, 2079]
    foresight = foresee([{token} for token in tokens])
    assert path_of(foresight) == tokens
    assert [draft.chance for draft in foresight.drafts] == [1.0] * 6
    assert path_of(foresee([{token} for token in tokens], max_drafts=2)) == tokens[:2]


def test_the_newest_of_the_places_that_are_most_alike_is_followed_if_the_grammar_allows_it():
    prompt = [1, 2, 3, 40, 9, 2, 3, 41, 9, 9, 3, 42, 1, 2, 3]
    assert path_of(foresee([], prompt, 2)) == [40, 9]
    assert path_of(foresee([{41, 42, 50}], prompt, 2)) == [41, 9]
    assert path_of(foresee([{42, 50}], prompt, 2)) == [42, 1]
    # Of few tokens one is taken though nothing is alike, of many none.
    assert path_of(foresee([{9, 1}], [*prompt, 60])) == [1]
    assert path_of(foresee([], [*prompt, 60])) == []
    assert path_of(foresee([{50, 51}], prompt)) == []


def test_what_the_output_may_resemble_comes_first():
    foresight = foresee([], prompt=[1, 2, 30, 31, 1, 2], before=[1, 2, 20, 21, 22], max_drafts=2)
    assert path_of(foresight) == [20, 21]
    assert all(draft.is_predicted for draft in foresight.drafts)


def test_a_path_ends_before_what_has_no_mask_and_with_what_ends_the_request():
    script = [{5}, {6}, {7}, {8}]
    assert path_of(foresee(script, fails_at=3)) == [5, 6]
    assert path_of(foresee(script, free_at=3)) == [5, 6]
    assert path_of(foresee(script, stop_ids=frozenset({7}))) == [5, 6, 7]
    with pytest.raises(GrammarError):
        foresee(script, fails_at=0)


def test_a_path_is_kept_as_far_as_it_is_followed():
    rule = Rule([{5}, {6, 7}, {8}, {9}, {10}])
    foresight, generated = Foresight([], [1, 6, 2], frozenset()), []

    def say(token_id: int) -> None:
        foresight.see(token_id)
        rule.advance(token_id)
        generated.append(token_id)

    foresight.extend(rule, generated, 3)
    assert path_of(foresight) == [5, 6, 8]
    masks = foresight.masks
    say(5)
    foresight.extend(rule, generated, 3)
    assert path_of(foresight) == [6, 8, 9]
    assert foresight.masks[0] is masks[0]
    say(7)
    assert path_of(foresight) == []
    foresight.extend(rule, generated, 3)
    assert path_of(foresight) == [8, 9, 10]


def test_what_is_never_right_is_drafted_no_more_until_it_would_be():
    rule, foresight, generated = Rule([{6, 7}] * 400), Foresight([], [7, 6, 3], frozenset()), []

    def are_drafted(num_tokens: int, says: dict[int, int]) -> list[bool]:
        """Of tokens that are what `says` has for what is thought to come."""
        found = []
        for _ in range(num_tokens):
            foresight.extend(rule, generated, 1)
            guess = foresight.drafts[0] if foresight.drafts else foresight._unlikely
            assert guess is not None
            found.append(bool(foresight.drafts))
            foresight.see(says[guess.token_id])
            rule.advance(says[guess.token_id])
            generated.append(says[guess.token_id])
        return found

    assert all(are_drafted(5, {6: 6, 7: 7}))
    assert not any(are_drafted(150, {6: 7, 7: 6})[-20:])
    assert all(are_drafted(100, {6: 6, 7: 7})[-20:])
