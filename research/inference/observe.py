"""What an engine does, step by step: the tokens of each sample, and when it got them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from research.inference.engine import Engine, Request

Sample = tuple[int, int]  # the number of a request, and the index of its sample


class Step(NamedTuple):
    """A step that ended ``seconds`` after the first one began, with the tokens that it yielded.

    ``measured``: what `observe` was asked to measure.
    """

    seconds: float
    tokens: dict[Sample, list[int]]
    measured: Any


@dataclasses.dataclass
class Observation:
    """The steps of an engine; tokens and log-probabilities of each sample, in order of requests."""

    steps: list[Step]
    tokens: dict[Sample, list[int]]
    logprobs: dict[Sample, list[float]]

    @property
    def seconds(self) -> float:
        """The time of all steps."""
        return self.steps[-1].seconds if self.steps else 0.0

    @property
    def decoding_steps(self) -> int:
        """The number of steps that yielded a token."""
        return sum(bool(step.tokens) for step in self.steps)

    def tokens_per_pass(self, first: int) -> list[int]:
        """The tokens of each of the ``first`` passes of every sample.

        Later passes may be cut short by the sample's length, and whether a pass is cut depends on
        how much it accepts: counting those that are whole would be biased.
        """
        passes: dict[Sample, list[int]] = {sample: [] for sample in self.tokens}
        for step in self.steps:
            for sample, tokens in step.tokens.items():
                passes[sample].append(len(tokens))
        return [count for counts in passes.values() for count in counts[:first]]

    def passes(self) -> int:
        """The number of pairs of a step and a sample that it gave a token."""
        return sum(len(step.tokens) for step in self.steps)

    def longest_gap(self, samples: Sequence[Sample], entering: Sample, first: int) -> float:
        """The longest time between two tokens of one of ``samples`` while another enters.

        ``entering`` is added before step ``first``; it enters until its first token.
        """
        last = next(i for i, step in enumerate(self.steps) if entering in step.tokens)
        begin = max(first - 1, 0)
        gaps = []
        for sample in samples:
            some = self.steps[begin : last + 1]
            times = [step.seconds for step in some if sample in step.tokens]
            gaps += [after - before for before, after in zip(times, times[1:], strict=False)]
        return max(gaps)

    def seconds_of_steps(self, rows: int) -> float:
        """The median time of the steps in which ``rows`` samples got a token and none entered.

        A sample enters in the step of its first token: a chunk of its prompt is computed in it.
        """
        seen: set[Sample] = set()
        times, end = [], 0.0
        for step in self.steps:
            if len(step.tokens) == rows and seen.issuperset(step.tokens):
                times.append(step.seconds - end)
            seen.update(step.tokens)
            end = step.seconds
        return statistics.median(times)


def observe(
    engine: Engine,
    requests: Sequence[Request],
    *,
    at: Sequence[int] | None = None,
    measure: Callable[[Engine], Any] = lambda engine: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Observation:
    """Run ``requests`` to their ends.

    Args:
      at: the step before which each is added, ascending; None: all before the first step.
      measure: called after each step; see `Step`.
    """
    at = [0] * len(requests) if at is None else at
    numbers: dict[int, int] = {}  # id of the engine → number of the request
    found = Observation([], {}, {})
    start, added = clock(), 0
    while added < len(requests) or engine.has_work:
        while added < len(requests) and at[added] <= len(found.steps):
            numbers[engine.add(requests[added])] = added
            added += 1
        tokens: dict[Sample, list[int]] = {}
        for event in engine.step():
            sample = (numbers[event.request], event.index)
            if event.token is not None:
                tokens.setdefault(sample, []).append(event.token)
                found.tokens.setdefault(sample, []).append(event.token)
                found.logprobs.setdefault(sample, []).append(event.logprob)
        found.steps.append(Step(clock() - start, tokens, measure(engine)))
    logprobs = dict(sorted(found.logprobs.items()))
    return Observation(found.steps, dict(sorted(found.tokens.items())), logprobs)
