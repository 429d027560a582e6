"""`Allocator`: which slot and which pages each running sequence has, and what they share."""

from collections.abc import Collection

import numpy as np

from research.inference.engine.config import EngineConfig
from research.inference.engine.pages import Pages
from research.inference.engine.prefixes import Prefix, Prefixes
from research.inference.engine.sequence import Sequence


class Allocator:
    """The slots, the pages and the kept prefixes of an engine.

    ``pages``, ``prefixes``: None without pages, or without sharing.
    """

    def __init__(self, config: EngineConfig):
        paged = config.cache.kind == "paged"
        self.config = config
        self.pages = Pages(config.pages, config.cache.page) if paged else None
        self.prefixes = Prefixes(self.pages, config.snapshots) if config.prefix else None
        self._table_bn = (
            np.full((config.slots, config.pages_per_slot), -1, np.int32) if paged else None
        )
        self._free_slots = list(range(config.slots - 1, -1, -1))

    def admit(self, sequence: Sequence) -> list[Prefix] | None:
        """Give ``sequence`` a slot and the pages of its prompt; None if there are too few.

        Returns the kept prefixes that it shares, and counts their tokens as prefilled.
        """
        if not self._free_slots:
            return None
        shared: list[Prefix] = []
        if self.prefixes is not None and not sequence.request.echo:
            shared = self.prefixes.longest(sequence.keys)
        if self.pages is not None:
            pages = [page for prefix in shared for page in prefix.pages]
            self.pages.share(pages)  # before others are dropped
            new = self._allocate(self.pages.needed(len(sequence.prompt)) - len(pages))
            if new is None:
                self.pages.release(pages)
                return None
            sequence.pages = pages + new
        sequence.slot = self._free_slots.pop()
        sequence.prefilled = len(shared) * self.config.chunk
        self._write_table(sequence)
        return shared

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Give ``sequence`` pages for its next ``count`` positions; False if too few are left."""
        if self.pages is None:
            return True
        missing = self.pages.needed(sequence.position + count) - len(sequence.pages)
        if missing <= 0:
            return True
        new = self._allocate(missing)
        if new is None:
            return False
        sequence.pages += new
        self._write_table(sequence)
        return True

    def fork(self, source: Sequence, target: Sequence) -> tuple[int, int] | None:
        """Give ``target`` a slot and the prompt's pages of ``source``; None if there are too few.

        Whole pages are shared. One that is partly full is to be copied: its id and that of the copy
        are returned, twice the same id if there is none.
        """
        if not self._free_slots:
            return None
        copied = (0, 0)
        if self.pages is not None:
            whole, part = divmod(source.to_prefill, self.pages.size)
            new = self._allocate(self.pages.needed(len(source.prompt)) - whole)
            if new is None:
                return None
            self.pages.share(source.pages[:whole])
            target.pages = source.pages[:whole] + new
            if part:
                copied = (source.pages[whole], new[0])
        target.slot = self._free_slots.pop()
        target.prefilled = source.prefilled
        self._write_table(target)
        return copied

    def table(self) -> np.ndarray | None:
        """The pages of each slot in their order, −1 beyond them; None if the cache has no pages."""
        # a copy: a program may still read it when the original changes
        return None if self._table_bn is None else self._table_bn.copy()

    def occupancy(self, running: Collection[Sequence]) -> tuple[int, int]:
        """Tokens that are held, and the room that is allocated, of the sequences ``running``."""
        if self.pages is None:
            held = sum(sequence.held for sequence in running)
            return held, len(running) * self.config.max_length
        size = self.pages.size
        tokens: dict[int, int] = {}
        for sequence in running:
            for i, page in enumerate(sequence.pages):
                of_page = min(max(sequence.held - i * size, 0), size)
                tokens[page] = max(tokens.get(page, 0), of_page)
        return sum(tokens.values()), len(tokens) * size

    def release(self, sequence: Sequence) -> None:
        """Take the slot and the pages of ``sequence``."""
        assert sequence.slot is not None
        if self.pages is not None:
            self.pages.release(sequence.pages)
        if self._table_bn is not None:
            self._table_bn[sequence.slot] = -1
        self._free_slots.append(sequence.slot)
        sequence.lose_memory()

    def _allocate(self, count: int) -> list[int] | None:
        assert self.pages is not None
        if self.prefixes is not None and not self.prefixes.make_room(count):
            return None
        return self.pages.allocate(count)

    def _write_table(self, sequence: Sequence) -> None:
        if self._table_bn is not None:
            self._table_bn[sequence.slot, : len(sequence.pages)] = sequence.pages
