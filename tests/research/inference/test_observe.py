"""Observations of a scripted engine: which tokens came in which step, and when."""

from types import SimpleNamespace
from typing import Any

import pytest

from research.inference.engine import Event
from research.inference.observe import observe


class Scripted:
    """An engine whose requests are lists of how many tokens each of their steps yields."""

    def __init__(self):
        self.waiting, self.next_id, self.now = {}, 10, 0.0

    def add(self, request) -> int:
        self.next_id += 3
        self.waiting[self.next_id] = list(request.passes)
        return self.next_id

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def step(self):
        self.now += 1.0 + len(self.waiting)
        events = []
        for name, passes in list(self.waiting.items()):
            for token in range(passes.pop(0)):
                events.append(Event(name, 0, token, "", -0.5 * token, [], None))
            if not passes:
                del self.waiting[name]
                events.append(Event(name, 0, None, "", 0.0, [], "length"))
        return events


def run(*requests, **options):
    engine: Any = Scripted()
    given: Any = [SimpleNamespace(passes=passes) for passes in requests]
    return observe(engine, given, clock=lambda: engine.now, **options)


def test_tokens_and_logprobs_are_those_of_each_request():
    found = run([2, 1], [0, 3, 1])
    assert found.tokens == {(0, 0): [0, 1, 0], (1, 0): [0, 1, 2, 0]}
    assert found.logprobs[1, 0] == [0.0, -0.5, -1.0, 0.0]
    assert list(run([0, 1], [1, 1]).tokens) == [(0, 0), (1, 0)]
    assert [sorted(step.tokens) for step in found.steps] == [
        [(0, 0)], [(0, 0), (1, 0)], [(1, 0)]
    ]  # fmt: skip
    # 1 second a step and 1 for each request that runs
    assert [step.seconds for step in found.steps] == [3.0, 6.0, 8.0]
    assert found.seconds == 8.0


def test_passes_are_the_first_of_each_request():
    found = run([4, 2, 1], [0, 3, 2])
    assert sorted(found.tokens_per_pass(first=2)) == [2, 2, 3, 4]
    assert sorted(found.tokens_per_pass(first=1)) == [3, 4]
    assert found.passes() == 5
    assert found.decoding_steps == 3
    assert run([0, 0, 1]).decoding_steps == 1


def test_requests_arrive_at_their_steps_and_gaps_are_those_of_others():
    found = run([1] * 6, [0, 0, 1], at=[0, 2], measure=lambda engine: len(engine.waiting))
    assert [step.measured for step in found.steps] == [1, 1, 2, 2, 1, 0]
    assert [(1, 0) in step.tokens for step in found.steps] == [False] * 4 + [True, False]
    # the first alone gets a token every 2 seconds, beside the second every 3
    assert found.longest_gap([(0, 0)], (1, 0), 2) == 3.0
    assert run([1] * 6, [1], at=[0, 5]).longest_gap([(0, 0)], (1, 0), 5) == 3.0
    # what comes after the first token of the one that enters does not count
    slow = run([1] * 4, [1, 0, 1], [0, 0, 1], at=[0, 1, 2])
    assert slow.longest_gap([(0, 0)], (1, 0), 1) == 3.0


def test_the_time_of_a_step_is_that_of_its_rows_without_one_that_enters():
    found = run([1, 1, 1], [0, 1, 1, 1])
    # both run in three steps; in the second one the second request has its first token
    assert found.seconds_of_steps(2) == 3.0
    assert found.seconds_of_steps(1) == 2.0
    assert [len(step.tokens) for step in found.steps] == [1, 2, 2, 1]


def test_an_engine_that_was_idle_waits_for_the_next_arrival():
    found = run([1], [1], at=[0, 3])
    assert [len(step.tokens) for step in found.steps] == [1, 0, 0, 1]


def test_a_sample_with_one_token_has_no_gap():
    with pytest.raises(ValueError):
        run([1], [1]).longest_gap([(0, 0)], (1, 0), 0)
