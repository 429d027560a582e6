"""Speculative decoding in an engine: what drafts, and which drafts a step verifies.

Leviathan 2023 (arXiv:2211.17192): a draft of several tokens costs little, and one pass of the model
gives the probabilities of all of them. Those that `research.inference.speculative.verify` accepts
are emitted, and one more token that the model chooses, so that their law is the model's own.
"""

import dataclasses

from layers.config import check, check_types
from layers.decoder import Decoder, DecoderConfig
from research.inference.engine.config import EngineConfig
from research.inference.engine.sequence import Sequence
from research.inference.ngram import NgramIndex

BY_MODEL = -1  # a draft that the draft model is to choose


@dataclasses.dataclass(frozen=True, eq=False)
class Speculative:
    """What drafts the tokens that the model verifies; exactly one of ``draft`` and ``ngram``.

    ``draft``: a smaller model with the same vocabulary. ``ngram``: (least, most): the tokens that
    followed where the last ``least`` to ``most`` tokens occurred before (prompt lookup, Saxena
    2023). ``tokens``: the most drafts of a step.
    """

    draft: Decoder | None = None
    ngram: tuple[int, int] | None = None
    tokens: int = 4

    def __post_init__(self):
        check_types(self)
        given = [name for name in ("draft", "ngram") if getattr(self, name) is not None]
        check(len(given) == 1, "speculative", given, "requires exactly one of draft and ngram")
        check(self.tokens > 0, "speculative.tokens", self.tokens, "must be > 0")
        if self.ngram is not None:
            NgramIndex([], *self.ngram)  # which checks them

    def check_model(self, model: DecoderConfig, config: EngineConfig) -> None:
        """Raise `ConfigError` if it cannot draft for ``model`` in an engine of ``config``."""
        limit = f"must be below max_length={config.max_length}"
        check(self.tokens < config.max_length, "speculative.tokens", self.tokens, limit)
        if self.draft is not None:
            size, required = self.draft.config.vocab_size, model.vocab_size
            same = f"must be the model's vocab_size={required}"
            check(size == required, "speculative.draft.vocab_size", size, same)
            config.check_model(self.draft.config)

    def drafts(self, sequence: Sequence) -> list[int]:
        """The drafts of the next step of ``sequence``; `BY_MODEL` where the draft model chooses.

        Known tokens are drafts too, when a step is computed again.
        """
        if sequence.known:
            return sequence.known[:-1]
        most = min(self.tokens, sequence.remaining - 1)
        if self.ngram is None:
            return [BY_MODEL] * most
        if sequence.ngrams is None:  # not before: those that wait are many, and an index is large
            sequence.ngrams = NgramIndex([*sequence.prompt, *sequence.tokens], *self.ngram)
        return sequence.ngrams.propose(most)
