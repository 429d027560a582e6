"""What an engine is asked, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from layers.config import ConfigError, check
from research.inference.grammar import Grammar
from research.inference.sampling import SamplingConfig
from research.inference.text import TextStream

MOST_SAMPLES = 16
NAN = "the model's log-probabilities are NaN"  # of an end by "nan"; "error" is a grammar's
FINISHED = ("stop", "length", "cancelled", "error", "nan")


class QueueFull(ConfigError):
    """As many requests wait as the engine's configuration allows."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    ``tokens``: the prompt. ``n``: how many independent samples. ``stop``: texts that end a sample;
    they are not part of its text. ``echo``: also give the log-probabilities of the prompt's tokens.
    ``grammar``: every sample is a text of it. ``salt``: only requests with the same salt share
    prefixes.
    """

    tokens: Sequence[int]
    sampling: SamplingConfig = SamplingConfig()
    n: int = 1
    stop: tuple[str, ...] = ()
    echo: bool = False
    grammar: Grammar | None = None
    salt: str = ""

    def __post_init__(self):
        is_count = type(self.n) is int and 1 <= self.n <= MOST_SAMPLES
        check(is_count, "n", self.n, f"must be an integer in [1, {MOST_SAMPLES}]")
        check(type(self.echo) is bool, "echo", self.echo, "must be True or False")
        for name, kind in (("sampling", SamplingConfig), ("salt", str)):
            value = getattr(self, name)
            check(isinstance(value, kind), name, value, f"must be of type {kind.__name__}")
        is_grammar = self.grammar is None or isinstance(self.grammar, Grammar)
        check(is_grammar, "grammar", self.grammar, "must be of type Grammar, or None")
        listed = isinstance(self.tokens, list | tuple | np.ndarray)
        check(listed, "tokens", self.tokens, "must be a list of tokens")
        check(len(self.tokens) > 0, "tokens", list(self.tokens), "must hold at least one token")
        TextStream.check_stop(self.stop)

    def check_tokens(self, vocab_size: int) -> None:
        """Raise `ConfigError` unless every token that is named is below ``vocab_size``."""
        for i, token in enumerate(self.tokens):
            integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            check(integer and 0 <= token < vocab_size, f"tokens[{i}]", token,
                  f"must be an integer in [0, vocab_size={vocab_size})")  # fmt: skip
        self.sampling.check_vocabulary(vocab_size)


class Event(NamedTuple):
    """One new token of sample ``index`` of a request, or its end.

    ``text``: what can be shown now; it may lag behind ``token``. ``logprob``: the token's
    log-probability under the model, before penalties, temperature and filters; ``top``: the
    likeliest tokens with theirs, as many as were asked for. ``finish_reason``: None, or one of
    `FINISHED`; an event with ``token`` None only ends the sample.
    """

    request: int
    index: int
    token: int | None
    text: str
    logprob: float
    top: list[tuple[int, float]]
    finish_reason: str | None


@dataclasses.dataclass
class Sample:
    """One continuation of a prompt: its tokens, their log-probabilities, and its text."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclasses.dataclass
class Result:
    """The answer to a request: ``n`` samples; with ``echo``, the prompt's log-probabilities.

    ``prompt_logprobs[i]`` is that of the prompt's token ``i``: None for the first.
    """

    samples: list[Sample]
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The tokens of the first sample."""
        return self.samples[0].tokens

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.samples[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first sample ended."""
        return self.samples[0].finish_reason

    def add(self, event: Event) -> None:
        """Add one event of this request."""
        sample: Any = self.samples[event.index]
        if event.token is not None:
            sample.tokens.append(event.token)
            sample.logprobs.append(event.logprob)
            sample.top.append(event.top)
        sample.text += event.text
        sample.finish_reason = event.finish_reason or sample.finish_reason

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finish_reason is not None for sample in self.samples)
