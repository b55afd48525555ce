"""What a request under a grammar may say next, as far as masks can be made ahead. No JAX.

A mask is known for a token if all before it are known. So a path of drafts is thought of: where the grammar leaves one
token it is that, else what followed the same tokens before (prompt lookup, of what the grammar allows), and where few
are allowed, as in JSON's layout, the newest of those. Nothing here decides what comes: each token is drawn under its
own mask, and the row leaves the path where it is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt32

from jaxllama.engine.scheduling.constraint import Constraint
from jaxllama.errors import RequestError

_FEW = 1024
_FIRST_CHANCES = {True: (0.4, 0.6, 0.75, 0.85, 0.9), False: (0.0, 0.0, 0.25, 0.5, 0.75)}
"""That a draft is right, by whether few tokens are allowed there, and how many before it are as they were."""
LEAST_CHANCE = 0.1
"""A path ends where it would hardly ever be followed."""
_WEIGHT = 1 / 8
_LONGEST = len(_FIRST_CHANCES[True]) - 1


class Draft(NamedTuple):
    """A token of a path: the chance that it comes if those before it do, for what kind that is learned (None: it is
    certain), and whether it was found in what the output may resemble."""

    token_id: int
    chance: float
    kind: tuple[bool, int] | None
    is_predicted: bool


class Foresight:
    """The path of one request, kept from one dispatch to the next as far as the request keeps to it.

    `drafts[i]` comes under `masks[i]`; there is one mask more than drafts, once there is any.
    """

    def __init__(self, before: Sequence[int], prompt: Sequence[int], stop_ids: frozenset[int]) -> None:
        """`before` is what the output may resemble. A request ends with any of `stop_ids`."""
        self.drafts: list[Draft] = []
        self.masks: list[UInt32[np.ndarray, " words"]] = []
        self._ahead: Constraint | None = None  # after all drafts
        self._unlikely: Draft | None = None  # what would come after them: no mask was made for it
        self._chances = {(few, i): chance for few, row in _FIRST_CHANCES.items() for i, chance in enumerate(row)}
        self._ids = np.array([*before, *prompt], np.int32)  # with room at the end
        self._start = len(before)
        self._num_given = len(self._ids)
        self._num_generated = 0
        self._stop_ids = stop_ids

    def extend(
        self,
        constraint: Constraint,
        generated: Sequence[int],
        max_drafts: int,
        least_chance: float = LEAST_CHANCE,
    ) -> None:
        """Makes the path as long as it can, up to `max_drafts`, while it comes with `least_chance`, for a request that
        must ask for its next token.

        Raises: RequestError if there is no mask for it.
        """
        if not self.masks:
            self.masks = [constraint.mask()]
            self._ahead = constraint.fork() if max_drafts else None
        if self._ahead is None:
            return
        end = self._put(generated)
        chance = float(np.prod([draft.chance for draft in self.drafts]))
        while self._ahead is not None and len(self.drafts) < max_drafts:
            draft = self._next(self._ids[: end + len(self.drafts)])
            if draft is None or chance * draft.chance < least_chance:
                self._unlikely = draft
                return
            chance *= draft.chance
            self._append(draft, end + len(self.drafts))

    def see(self, token_id: int) -> None:
        """Takes the next token of the request. What was thought to follow another is worth nothing."""
        is_beyond = not self.drafts
        draft = self._unlikely if is_beyond else self.drafts.pop(0)
        if draft is not None and draft.kind is not None:
            self._chances[draft.kind] += _WEIGHT * ((draft.token_id == token_id) - self._chances[draft.kind])
        if draft is None or is_beyond or draft.token_id != token_id:
            self.drafts, self.masks, self._ahead, self._unlikely = [], [], None, None
        else:
            self.masks.pop(0)

    def _put(self, generated: Sequence[int]) -> int:
        """Brings `_ids` up to date. Returns where the request's text ends in it; the path follows."""
        end = self._num_given + len(generated)
        if end + len(self.masks) > len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(end + 64, np.int32)))
        self._ids[self._num_given + self._num_generated : end] = generated[self._num_generated :]
        self._num_generated = len(generated)
        return end

    def _next(self, ids: Int[np.ndarray, " ids"]) -> Draft | None:
        """What may come after `ids` under the last mask."""
        mask, last = self.masks[-1], len(ids) - 1
        num_allowed = int(np.bitwise_count(mask).sum())
        if num_allowed == 1:
            word = int(mask.argmax())
            return Draft(32 * word + int(mask[word]).bit_length() - 1, 1.0, None, is_predicted=False)
        following = ids[1:]
        places = np.flatnonzero(mask[following >> 5] >> (following & 31).astype(np.uint32) & 1)
        length = 0
        while places.size and length < _LONGEST:
            longer = places[places >= length]
            longer = longer[ids[longer - length] == ids[last - length]]
            if not longer.size:
                break
            places, length = longer, length + 1
        kind = (num_allowed <= _FEW, length)
        if not places.size or not _FIRST_CHANCES[kind[0]][length]:
            return None
        predicted = places[places < self._start]
        place = int((predicted if predicted.size else places)[-1])
        return Draft(int(ids[place + 1]), self._chances[kind], kind, is_predicted=place < self._start)

    def _append(self, draft: Draft, place: int) -> None:
        """Adds a draft to the path and its token to the text, if there is a mask after it; else the path ends here."""
        ahead, self._ahead = self._ahead, None
        assert ahead is not None
        if draft.token_id in self._stop_ids:
            # Nothing comes after it.
            self.masks.append(self.masks[-1])
        else:
            try:
                ahead.advance(draft.token_id)
                if ahead.num_free > 0:
                    return
                self.masks.append(ahead.mask())
            except RequestError:
                return
            self._ahead = ahead
        self.drafts.append(draft)
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(64, np.int32)))
        self._ids[place] = draft.token_id
