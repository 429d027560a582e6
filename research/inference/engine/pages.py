"""The pool of cache pages: which are free, and how many sequences share each (PagedAttention).

Kwon 2023 (arXiv:2309.06180, §4.2–4.4): a sequence's keys and values are in pages of a fixed size,
anywhere in the pool; a page that several sequences share is counted, and is free when none has it.
"""

from collections.abc import Iterable


class Pages:
    """The ids ``0 … count − 1`` of the pages of ``size`` tokens; each is free or held."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))  # the last is the next to be given out
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """The number of free pages."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """The number of pages for ``tokens`` tokens."""
        return -(-tokens // self.size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` free pages, each now held once; None, and no change, if there are fewer."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold each of ``pages`` once more."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold each of ``pages`` once less; those that nothing holds are free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many times ``page`` is held."""
        return self._holders[page]
