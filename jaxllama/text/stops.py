"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back only what may still belong to one.

    The match is the one `re.search("|".join(map(re.escape, stop)), text)` finds in the whole text: the leftmost, of
    several that start there the first listed. It does not depend on how the text was cut. The text up to the match is
    emitted, with `include` the match too; whatever follows is dropped.

    A match is sometimes decided only by later text (of `["abc", "b"]` after "ab"): then `flush` decides it, and
    `matched` tells.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """Raises: ValueError if a stop string is empty."""
        if not all(stop):
            raise ValueError("a stop string is empty")
        self._automata = [_PrefixAutomaton(text) for text in dict.fromkeys(stop)]
        self._include = include
        self._held = ""
        self._best: tuple[int, int] | None = None  # (start, index) of the best complete match; start counts from _held
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text to emit and the stop string that matched, if one has."""
        if self.matched is not None:
            return "", self.matched
        if not self._automata:
            return text, None
        position = len(self._held)
        self._held += text
        for char in text:
            position += 1
            self._advance(char, position)
            if self._best is not None and self._is_decided(position):
                return self._finish(), self.matched
        return self._release(position), None

    def flush(self) -> str:
        """The text held back, at the end of the text. `matched` is set if what was undecided is a match."""
        if self.matched is not None:
            return ""
        if self._best is not None:
            return self._finish()
        held, self._held = self._held, ""
        for automaton in self._automata:
            automaton.num_matched = 0
        return held

    def _advance(self, char: str, position: int) -> None:
        for index, automaton in enumerate(self._automata):
            if automaton.push(char):
                match = (position - len(automaton.text), index)
                self._best = match if self._best is None else min(self._best, match)

    def _is_decided(self, position: int) -> bool:
        """Whether nothing that is still open would come before the best match."""
        assert self._best is not None
        return all((position - a.num_matched, i) >= self._best for i, a in enumerate(self._automata) if a.num_matched)

    def _finish(self) -> str:
        assert self._best is not None
        start, index = self._best
        self.matched = self._automata[index].text
        text = self._held[: start + len(self.matched) if self._include else start]
        self._held = ""
        return text

    def _release(self, position: int) -> str:
        keep = position - max(automaton.num_matched for automaton in self._automata)
        if self._best is not None:
            keep = min(keep, self._best[0])
            self._best = (self._best[0] - keep, self._best[1])
        text, self._held = self._held[:keep], self._held[keep:]
        return text


class _PrefixAutomaton:
    """How many characters at the end of the text so far begin `text`.

    Source: Knuth, Morris and Pratt 1977, "Fast pattern matching in strings".
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fallback = [0] * (len(text) + 1)  # the longest proper prefix of text[:n] that also ends it
        matched = 0
        for n in range(1, len(text)):
            while matched and text[n] != text[matched]:
                matched = self._fallback[matched]
            matched += text[n] == text[matched]
            self._fallback[n + 1] = matched

    def push(self, char: str) -> bool:
        """Whether `text` ends with this character. A complete match counts on as its longest proper border."""
        matched = self.num_matched
        while matched and char != self.text[matched]:
            matched = self._fallback[matched]
        matched += char == self.text[matched]
        complete = matched == len(self.text)
        self.num_matched = self._fallback[matched] if complete else matched
        return complete
