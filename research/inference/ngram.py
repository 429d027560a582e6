"""Prompt lookup (Saxena 2023): drafts are what followed the last tokens when they occurred before.

https://github.com/apoorvumang/prompt-lookup-decoding
"""

from collections.abc import Iterable

from layers.config import check


class NgramIndex:
    """The tokens of one row, and where each of their n-grams, ``least`` ≤ n ≤ ``most``, was last.

    A token costs ``most − least + 1`` entries of a dictionary, however long the row is.

    Raises:
      ConfigError: not 1 ≤ ``least`` ≤ ``most``.
    """

    def __init__(self, tokens: Iterable[int], least: int, most: int):
        integers = all(type(n) is int for n in (least, most))
        check(integers and 1 <= least <= most, "ngram", (least, most), "must be 1 ≤ least ≤ most")
        self._lengths = range(most, least - 1, -1)
        self._tokens: list[int] = []
        # an n-gram → where its last continuation begins: the n-gram at the end has none yet
        self._continuation: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add ``tokens`` at the end of the row."""
        for token in tokens:
            for ngram in self._ends():
                self._continuation[ngram] = len(self._tokens)
            self._tokens.append(int(token))

    def propose(self, count: int) -> list[int]:
        """At most ``count`` drafts of the tokens that follow.

        They are the continuation of the most recent earlier occurrence of the longest end of the
        row that has one; [] if none has.
        """
        for ngram in self._ends():
            start = self._continuation.get(ngram)
            if start is not None:
                return self._tokens[start : start + count]
        return []

    def _ends(self) -> Iterable[tuple[int, ...]]:
        """The n-grams at the end of the row, longest first."""
        return (tuple(self._tokens[-n:]) for n in self._lengths if n <= len(self._tokens))
