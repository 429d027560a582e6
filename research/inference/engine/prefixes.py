"""Prefix sharing: what was computed for the first chunks of a prompt, kept for later prompts.

A chunk's key is the SHA-256 of the key of the chunk before it and of its own tokens, so that equal
keys mean equal prefixes. The first key hashes the model, the adapter and a salt: users with
different salts never share, so that none learns from the time of an answer what another has sent.

What is kept for a chunk is its pages, and the recurrent states after it. A prompt resumes after the
longest prefix that is kept. Its chunks begin where they would begin without sharing, so its tokens
are the same bit for bit.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.inference.engine.pages import Pages


@dataclasses.dataclass
class Prefix:
    """What is kept for one chunk: its pages, and a snapshot of the recurrent states after it."""

    key: bytes
    pages: list[int]
    snapshot: Any
    snapshot_bytes: int
    children: int = 0
    parent: bytes | None = None


def chain(root: bytes, tokens: Sequence[int], chunk: int) -> list[bytes]:
    """The keys of the whole chunks of ``tokens``."""
    keys, key = [], root
    for start in range(0, len(tokens) - chunk + 1, chunk):
        content = np.asarray(tokens[start : start + chunk], "<u4").tobytes()
        key = hashlib.sha256(key + content).digest()
        keys.append(key)
    return keys


def root(model: str, adapter: str, salt: str) -> bytes:
    """The key before the first chunk; each name is hashed with its length."""
    names = [name.encode() for name in (model, adapter, salt)]
    content = b"".join(len(name).to_bytes(8, "little") + name for name in names)
    return hashlib.sha256(content).digest()


class Prefixes:
    """The kept prefixes, at most ``snapshot_limit`` bytes of snapshots; the oldest are dropped.

    ``pages``: the pool whose pages they hold; None if the model has none.
    """

    def __init__(self, pages: Pages | None, snapshot_limit: int):
        self._pages, self._limit = pages, snapshot_limit
        self._kept: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def longest(self, keys: Sequence[bytes]) -> list[Prefix]:
        """The kept prefixes of the first of ``keys``, now the last to be dropped."""
        found: list[Prefix] = []
        for key in keys:
            if key not in self._kept:
                break
            found.append(self._kept[key])
        for prefix in reversed(found):  # a parent is used after its children
            self._kept.move_to_end(prefix.key)
        return found

    def keep(
        self, key: bytes, parent: bytes | None, pages: list[int], snapshot: Any, size: int
    ) -> None:
        """Keep a chunk's ``pages`` (they are held once more) and ``snapshot`` of ``size`` bytes.

        Nothing is kept without the chunk before it, or if the snapshot exceeds the limit.
        """
        if key in self._kept or (parent is not None and parent not in self._kept):
            return
        while self._bytes + size > self._limit:
            if not self._drop(lambda prefix: prefix.key != parent):
                return
        if parent is not None:
            self._kept[parent].children += 1
        if self._pages is not None:
            self._pages.share(pages)
        self._bytes += size
        self._kept[key] = Prefix(key, list(pages), snapshot, size, parent=parent)

    def make_room(self, count: int) -> bool:
        """Drop prefixes that no sequence uses until ``count`` pages are free.

        False if there are too few; then none is dropped in vain.
        """
        pages = self._pages
        assert pages is not None

        def is_unused(prefix: Prefix) -> bool:
            return all(pages.holders(page) == 1 for page in prefix.pages)

        if pages.free < count:
            unused = sum(len(p.pages) for p in self._kept.values() if is_unused(p))
            if pages.free + unused < count:
                return False
        while pages.free < count:
            if not self._drop(is_unused):
                return False
        return True

    def clear(self) -> None:
        """Drop all prefixes."""
        while self._drop(lambda prefix: True):
            pass

    def _drop(self, may: Callable[[Prefix], bool]) -> bool:
        """Drop the least recently used prefix that no other continues; False if none ``may`` be."""
        for prefix in self._kept.values():
            if prefix.children == 0 and may(prefix):
                break
        else:
            return False
        del self._kept[prefix.key]
        self._bytes -= prefix.snapshot_bytes
        if prefix.parent is not None:
            self._kept[prefix.parent].children -= 1
        if self._pages is not None:
            self._pages.release(prefix.pages)
        return True
