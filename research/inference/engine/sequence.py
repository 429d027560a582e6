"""`Sequence`: what the scheduler knows of one sample while it waits, prefills and decodes."""

import dataclasses
from typing import Any

from research.inference.engine.request import Request


@dataclasses.dataclass(eq=False)
class Sequence:
    """Sample ``index`` of a request.

    ``tokens``: what was generated. ``slot``, ``pages``: its memory, while it runs. ``prefilled``:
    how many tokens of the prompt are in that memory; the last one is the first input of decoding.
    ``steps``: decoding steps since it got the slot; while that is less than ``len(tokens)``, known
    tokens are computed again, after the sequence had lost its memory.
    """

    request_id: int
    index: int
    request: Request
    prompt: list[int]
    stream: Any
    matcher: Any
    keys: list[bytes]  # of the whole chunks of the prompt
    tokens: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    prefilled: int = 0
    steps: int = 0
    is_decoding: bool = False

    @property
    def to_prefill(self) -> int:
        """The number of prompt tokens that come before the first input of decoding."""
        return len(self.prompt) - 1

    @property
    def position(self) -> int:
        """The position of the next input of decoding."""
        return self.to_prefill + self.steps

    @property
    def held(self) -> int:
        """The number of tokens in its memory."""
        return self.prefilled + self.steps

    @property
    def forced(self) -> int:
        """The known token of the next step, or −1."""
        return self.tokens[self.steps] if self.steps < len(self.tokens) else -1

    def lose_memory(self) -> None:
        """Forget the slot and the pages: all is computed again later."""
        self.slot, self.pages = None, []
        self.prefilled = self.steps = 0
        self.is_decoding = False
