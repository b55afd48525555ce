"""How a prompt is cut into chunks, and the names of the pages that they write. No JAX."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

_FULL_ENOUGH = 0.75


class Span(NamedTuple):
    """Tokens `start … start + num_tokens` of a prompt, to run in a program made for `size` tokens."""

    start: int
    num_tokens: int
    size: int


@dataclass(frozen=True)
class ChunkPlan:
    """Cuts prompts into chunks of `sizes` (ascending multiples of `page_size`).

    If `programs_agree` (see `Platform`), a chunk may start at any page, and a page is named by the tokens up to its
    end. Otherwise a token's bits depend on the program that computes it and on its place there. Then the cut depends on
    the prompt's length alone, a page's name includes its program and place, and only whole chunks are found again. To
    cut prompts of different lengths alike for as long as possible, a chunk that is not full is then no longer than
    all that precedes it.

    If `skips_padding`, a program takes the time of the tokens that there are (and programs agree): that of the largest
    size runs all chunks, whatever their length, and the other sizes say only how much is run at once. A chunk may start
    within a page there.
    """

    sizes: tuple[int, ...]
    page_size: int
    programs_agree: bool
    skips_padding: bool = False

    @property
    def program_sizes(self) -> tuple[int, ...]:
        """The sizes of which there are programs."""
        return self.sizes[-1:] if self.skips_padding else self.sizes

    def cost(self, span: Span) -> int:
        """The tokens that `span` takes the time of."""
        return span.num_tokens if self.skips_padding else span.size

    def longest(self, *, has_streams: bool) -> int:
        """How many tokens to prefill at once: the largest chunk, or, if streams wait meanwhile and the cut is free, the
        middle size."""
        return self.sizes[(len(self.sizes) - 1) // 2 if has_streams and self.programs_agree else -1]

    def spans(self, start: int, end: int, longest: int | None = None) -> Iterator[Span]:
        """The chunks of tokens `start … end`, of at most `longest` (one that `longest` gave; None: any).

        `start` is one that `usable` gave.
        """
        sizes = self.sizes if longest is None else self.sizes[: self.sizes.index(longest) + 1]
        at = start if self.programs_agree else 0
        while at < end:
            size = sizes[-1] if self.skips_padding else self._size(sizes, at, end - at)
            span = Span(at, min(size, end - at), self.sizes[-1] if self.skips_padding else size)
            if at >= start:
                yield span
            at += span.num_tokens

    def draft_spans(self, start: int, end: int) -> Iterator[Span]:
        """The chunks of tokens `start … end` for a draft model, whose bits do not matter. `start` is a page's."""
        yield from replace(self, programs_agree=True).spans(start, end)

    def _size(self, sizes: Sequence[int], at: int, left: int) -> int:
        """The smallest size that holds the `left` tokens, if they nearly fill it; otherwise the largest they fill."""
        longest = sizes[-1] if self.programs_agree else max(at, sizes[0])
        enough = next((size for size in sizes if left <= size <= longest), None)
        if enough is not None and left >= _FULL_ENOUGH * enough:
            return enough
        return max((size for size in sizes if size <= left), default=sizes[0])

    def usable(self, num_tokens: int, end: int) -> int:
        """How many of the first `num_tokens` (whole pages), found in the cache, a prompt of `end` tokens may use."""
        if self.programs_agree:
            return num_tokens
        edges = [span.start for span in self.spans(0, end)] + [end]
        return max(edge for edge in edges if edge <= num_tokens)

    def root(self, scope: bytes) -> bytes:
        """What comes before the first page's content in its name."""
        return blake2b(scope, digest_size=32).digest()

    def page_keys(self, scope: bytes, ids: Sequence[int]) -> list[bytes]:
        """Names of the full pages of `ids`, each of everything up to its end. Nothing is shared between scopes."""
        keys: list[bytes] = []
        parent = self.root(scope)
        for span in self.spans(0, len(ids)):
            program = b"" if self.programs_agree else array("q", (span.start, span.size)).tobytes()
            num_full = span.num_tokens // self.page_size * self.page_size
            new = self.more_keys(parent, ids[span.start : span.start + num_full], program)
            keys += new
            parent = new[-1] if new else parent
        return keys

    def part_key(self, scope: bytes, page_keys: Sequence[bytes], ids: Sequence[int]) -> bytes:
        """The name of the page that the end of `ids` fills in part, of which `page_keys` begin with the full pages'.

        Empty where it fills none, and where no chunk could start after it.
        """
        num_full, left = divmod(len(ids), self.page_size)
        if not left or not self.skips_padding:
            return b""
        parent = page_keys[num_full - 1] if num_full else self.root(scope)
        return blake2b(parent + array("q", ids[-left:]).tobytes(), digest_size=32).digest()

    def more_keys(self, parent: bytes, ids: Sequence[int], program: bytes = b"") -> list[bytes]:
        """Names of the full pages of `ids` that follow the page `parent`."""
        keys = []
        for start in range(0, len(ids) - self.page_size + 1, self.page_size):
            content = array("q", ids[start : start + self.page_size]).tobytes()
            parent = blake2b(parent + program + content, digest_size=32).digest()
            keys.append(parent)
        return keys
