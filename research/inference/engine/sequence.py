"""`Sequence`: what the scheduler knows of one sample while it waits, prefills and decodes."""

import bisect
import dataclasses
from typing import Any

from research.inference.engine.request import Request


@dataclasses.dataclass(eq=False)
class Sequence:
    """Sample ``index`` of a request.

    ``ngrams``: an `NgramIndex` of its tokens, once these are drafted from. ``tokens``: what was
    generated. ``ends``: how many they were after each decoding step. ``slot``,
    ``pages``: its memory, while it runs. ``prefilled``: how many tokens of the prompt are in that
    memory; the last one is the first input of decoding. ``decoded``: new tokens since it got the
    slot; while that is less than ``len(tokens)``, known tokens are computed again, in the same
    steps as before, after the sequence had lost its memory.
    """

    request_id: int
    index: int
    request: Request
    prompt: list[int]
    stream: Any
    matcher: Any
    keys: list[bytes]  # of the whole chunks of the prompt
    ngrams: Any = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    prefilled: int = 0
    decoded: int = 0
    is_decoding: bool = False

    @property
    def to_prefill(self) -> int:
        """The number of prompt tokens that come before the first input of decoding."""
        return len(self.prompt) - 1

    @property
    def position(self) -> int:
        """The position of the next input of decoding."""
        return self.to_prefill + self.decoded

    @property
    def held(self) -> int:
        """The number of tokens in its memory."""
        return self.prefilled + self.decoded

    @property
    def remaining(self) -> int:
        """The most tokens that may still be generated."""
        return self.request.sampling.max_new_tokens - len(self.tokens)

    @property
    def known(self) -> list[int]:
        """The known tokens of the next step; none if it generates new ones."""
        if self.decoded == len(self.tokens):
            return []
        end = self.ends[bisect.bisect_right(self.ends, self.decoded)]
        return self.tokens[self.decoded : end]

    def lose_memory(self) -> None:
        """Forget the slot and the pages: all is computed again later."""
        self.slot, self.pages = None, []
        self.prefilled = self.decoded = 0
        self.is_decoding = False
