"""What an engine has done."""

import dataclasses


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made, and the seconds of its steps.

    ``prefilled``: prompt tokens that were computed; ``shared``: that were not, for their prefix was
    kept. ``generated``: new tokens. ``replayed``: tokens computed again after a preemption.
    ``passes``: how often the model computed a sample's next tokens: ``generated`` without
    speculation. ``proposed_at[i]``, ``accepted_at[i]``: how many drafts were the ``i``-th of their
    pass, and how many of these became tokens.
    """

    steps: int = 0
    prefilled: int = 0
    shared: int = 0
    generated: int = 0
    replayed: int = 0
    preemptions: int = 0
    passes: int = 0
    proposed_at: list[int] = dataclasses.field(default_factory=list)
    accepted_at: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def proposed(self) -> int:
        """The number of drafts."""
        return sum(self.proposed_at)

    @property
    def accepted(self) -> int:
        """The number of drafts that were emitted."""
        return sum(self.accepted_at)
