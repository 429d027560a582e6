"""Text from tokens as they come, never half a character."""

from collections.abc import Iterable
from typing import Protocol


class Decodes(Protocol):
    """What a `TextStream` requires of a tokenizer."""

    def decode(self, ids: Iterable[int]) -> str: ...


class TextStream:
    """Decodes one row token by token: ``push`` returns the text that is now certain.

    A character may span tokens (UTF-8 bytes do), so text that ends in an unfinished one, which
    decodes to U+FFFD, is held back until something finished follows or ``flush`` shows it. The
    pieces joined are ``tokenizer.decode(tokens)``.
    """

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Tokens before _shown have been returned. Those from _context on are decoded again with
        # the new ones, because some tokenizers drop the space of what they take for a beginning.
        self._context = self._shown = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return new

    def flush(self) -> str:
        """What is held back, at the end."""
        new = self._new()
        self._context, self._shown = self._shown, len(self._tokens)
        return new

    def _new(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._tokens[self._context : self._shown])
        return decode(self._tokens[self._context :])[len(before) :]
