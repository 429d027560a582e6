"""Decodes a stream of tokens to text without incomplete characters."""

from collections.abc import Iterable
from typing import Protocol


class Decodes(Protocol):
    """The method of a tokenizer that `TextStream` requires."""

    def decode(self, ids: Iterable[int]) -> str: ...


class TextStream:
    """Decodes one row token by token: ``push`` returns the new text that can no longer change.

    A character may consist of several tokens, such as bytes of UTF-8. Text that ends in an
    incomplete character, which decodes to U+FFFD, is kept until the character is complete or
    ``flush`` returns it. The pieces together are ``tokenizer.decode(tokens)``.
    """

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Tokens before _shown have been returned. Those from _context on are decoded again with
        # the new ones, because some tokenizers drop the space at the beginning of a text.
        self._context = self._shown = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return new

    def flush(self) -> str:
        """The text that is still kept, at the end of the row."""
        new = self._new()
        self._context, self._shown = self._shown, len(self._tokens)
        return new

    def _new(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._tokens[self._context : self._shown])
        return decode(self._tokens[self._context :])[len(before) :]


class StopStream(TextStream):
    is_stopped = False

    def __init__(self, tokenizer, stop):
        super().__init__(tokenizer)
