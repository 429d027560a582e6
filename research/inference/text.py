"""Decodes a stream of tokens to text without incomplete characters, up to a stop string."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from layers.config import check

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# No character has as many tokens: what is still incomplete then is shown as it is.
_MOST_INCOMPLETE = 64


class Decodes(Protocol):
    """The method of a tokenizer that `TextStream` requires."""

    def decode(self, ids: Iterable[int]) -> str: ...


class TextStream:
    """Decodes one row token by token: ``push`` returns the new text that can no longer change.

    A character may consist of several tokens, such as bytes of UTF-8. An incomplete character at
    the end, which decodes to U+FFFD, is kept until it is complete or ``flush`` returns it. The
    pieces together are ``tokenizer.decode(tokens)``, up to the first stop string. An end that may
    be the beginning of a stop string is kept too.

    ``stopped`` is the stop string that was met, or None: the one that is complete first, whatever
    the tokens; of several that end together, the longest. Neither it nor what follows is returned.

    Raises:
      ConfigError: a stop string is empty, or ``stop`` is one text.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()):
        self.check_stop(stop)
        self.stopped: str | None = None
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        # Tokens before _shown are decoded. Those from _context on are decoded again with the new
        # ones, because some tokenizers drop the space at the beginning of a text.
        self._context = self._shown = 0
        self._decoded = 0  # characters of the tokens after _shown that are decoded already
        self._kept = ""  # may be the beginning of a stop string

    @staticmethod
    def check_stop(stop: Sequence[str]) -> None:
        """Raise `ConfigError` unless ``stop`` is a list of texts that are not empty."""
        check(not isinstance(stop, str), "stop", stop, "must be a list of texts")
        for i, text in enumerate(stop):
            is_text = isinstance(text, str) and text != ""
            check(is_text, f"stop[{i}]", text, "must be a text, not ''")

    def push(self, token: int) -> str:
        self._tokens.append(token)
        new = self._new()
        complete = new.rstrip(_UNKNOWN)
        if (new and new == complete) or len(self._tokens) - self._shown > _MOST_INCOMPLETE:
            return self._take(new)
        piece = complete[self._decoded :]
        self._decoded += len(piece)
        return self._before_stop(piece)

    def flush(self) -> str:
        """The text that is still kept, at the end of the row."""
        text = self._take(self._new())
        if self.stopped is None:
            text, self._kept = text + self._kept, ""
        return text

    def _new(self) -> str:
        """The text of the tokens after ``_shown``."""
        decode = self._tokenizer.decode
        before = decode(self._tokens[self._context : self._shown])
        return decode(self._tokens[self._context :])[len(before) :]

    def _take(self, new: str) -> str:
        """All of ``new``, the text of the tokens after ``_shown``."""
        piece = new[self._decoded :]
        self._context, self._shown, self._decoded = self._shown, len(self._tokens), 0
        return self._before_stop(piece)

    def _before_stop(self, piece: str) -> str:
        """What can be shown of the kept text and ``piece``; keeps the rest."""
        if self.stopped is not None:
            return ""
        text = self._kept + piece
        found = [(text.find(stop), stop) for stop in self._stop]
        ends = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if ends:
            _, at, self.stopped = min(ends)
            self._kept = ""
            return text[:at]
        longest = max(map(len, self._stop), default=1)
        starts = (text[-n:] for n in range(min(len(text), longest - 1), 0, -1))
        self._kept = next((end for end in starts if self._begins(end)), "")
        return text[: len(text) - len(self._kept)]

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
