"""Which pages of the KV pool belong to whom, and which can be found again by what they hold. No JAX."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Pages 1 … num_pages - 1 and how many rows hold each; page 0 stands for "none" in page tables.

    A full page can get a key that names its content (`publish`): other rows then find and hold it too. What nobody
    holds any more stays to be found until `take` needs it, least recently used first. That goes for pages known to be
    finite (`prove`) alone: the others lose their key, because they may hold a failed row's NaN.
    Of each it is known whether the draft model's part is filled too (`fill_draft`). A page that is filled in part by
    what others begin with too has a name for that part (`name_part`), for as long as nobody takes it anew.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._is_finite = [False] * num_pages
        self._has_draft = [False] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._part_keys: list[bytes | None] = [None] * num_pages
        self._by_part_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, those included that are kept to be found."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that rows hold."""
        return self.num_pages - 1 - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages that can be found by their keys."""
        return len(self._by_key)

    def take(self, count: int) -> list[int] | None:
        """`count` pages for one holder, or None (and nothing is taken) if there are not that many."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._unpublish(page)
            self._forget_part(page)
            self._holders[page], self._is_finite[page], self._has_draft[page] = 1, False, False
            taken.append(page)
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of `keys` up to the first that is not known."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for pages that `find` gave."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def publish(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Lets others find these pages, to which their holder writes no more. A key keeps the first page it names."""
        for page, key in zip(pages, keys, strict=True):
            if self._keys[page] is None and key not in self._by_key:
                self._keys[page] = key
                self._by_key[key] = page

    def name_part(self, page: int, key: bytes) -> None:
        """Lets others copy the beginning of `page`, which is on its way to the device; what follows may change."""
        if key not in self._by_part_key:
            self._forget_part(page)
            self._part_keys[page] = key
            self._by_part_key[key] = page

    def find_part(self, key: bytes) -> int | None:
        """The page whose beginning is named so."""
        return self._by_part_key.get(key)

    def prove(self, pages: Iterable[int]) -> None:
        """Marks pages as finite: a token was computed from what they hold."""
        for page in pages:
            self._is_finite[page] = True

    def fill_draft(self, pages: Iterable[int]) -> None:
        """Notes that the draft model's keys and values are in these pages."""
        for page in pages:
            self._has_draft[page] = True

    def num_with_draft(self, pages: Sequence[int]) -> int:
        """How many of these pages, up to the first that has not, have the draft model's part."""
        return next((i for i, page in enumerate(pages) if not self._has_draft[page]), len(pages))

    def distrust(self, pages: Iterable[int]) -> None:
        """Lets nobody find these pages any more, except those known to be finite."""
        for page in pages:
            if not self._is_finite[page]:
                self._unpublish(page)
                self._forget_part(page)

    def give_back(self, pages: Sequence[int]) -> list[int]:
        """Removes one holder. Returns the pages that are free now and may hold NaN.

        A row's last pages are reused first: a page can only be found after all those before it.
        """
        unclean = []
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page]:
                continue
            if self._is_finite[page] and self._keys[page] is not None:
                self._idle[page] = None
                continue
            self._unpublish(page)
            self._free.append(page)
            if not self._is_finite[page]:
                unclean.append(page)
        return unclean

    def forget(self) -> None:
        """Nothing is found any more of what was written so far."""
        for page in range(self.num_pages):
            self._unpublish(page)
            self._forget_part(page)
        self._free += self._idle
        self._idle.clear()

    def _forget_part(self, page: int) -> None:
        key = self._part_keys[page]
        if key is not None:
            del self._by_part_key[key]
            self._part_keys[page] = None

    def _unpublish(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._by_key[key]
            self._keys[page] = None
