"""Which pages of the KV pool belong to whom. No JAX."""

from __future__ import annotations


class PageAllocator:
    """Hands out pages 1 … num_pages - 1; page 0 stands for "none" in page tables."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that rows hold."""
        return self.num_pages - 1 - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing is taken) if there are not that many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Frees pages that `take` gave."""
        self._free.extend(reversed(pages))
