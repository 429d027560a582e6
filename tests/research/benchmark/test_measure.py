"""Turns, time limits, failures, agreement and gradients, on fake functions and a fake clock."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.benchmark import measure


def test_each_runs_in_turn_and_one_whose_time_is_spent_sits_out(ticks):
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times, failed = measure.interleave(runs, 3, 100.0, clock=ticks)
    assert "".join(calls) == "abc" * 3 and not failed
    assert times == {name: [1.0] * 3 for name in "abc"}
    times, _ = measure.interleave(runs, 9, 2.0, clock=ticks)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_what_runs_ahead_is_not_timed_but_counts_against_the_deadline(ticks):
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times, _ = measure.interleave(runs, 2, 100.0, clock=ticks, ahead=2)
    assert "".join(calls) == "aaabbb" * 2 and times == {"a": [1.0] * 2, "b": [1.0] * 2}
    # ends at 3; the next would begin at 4 and end at 7
    times, _ = measure.interleave({"a": lambda: None}, 9, 100.0, ticks() + 7.0, ticks, ahead=2)
    assert times == {"a": [1.0]}


def test_one_that_fails_in_a_late_round_is_named_and_the_others_go_on(ticks):
    left = [1, 1]

    def fails():
        left.pop()

    times, failed = measure.interleave({"a": fails, "b": lambda: None}, 4, 100.0, clock=ticks)
    assert failed == {"a": "failed: IndexError: pop from empty list"}
    assert times == {"b": [1.0] * 4}


def test_what_is_not_reached_says_so(ticks):
    runs = {name: lambda: None for name in "abc"}
    # a reads the clock at 0 and 1, b at 2 and 3, c at 4
    times, failed = measure.interleave(runs, 3, 100.0, deadline=4.0, clock=ticks)
    assert times == {"a": [1.0], "b": [1.0]} and failed == {"c": "not run: budget"}


def test_one_is_not_begun_that_would_end_too_late(ticks):
    # began at 0 and took 1 second; the next would begin at 2, end at 3
    times, _ = measure.interleave({"a": lambda: None}, 9, 100.0, deadline=3.0, clock=ticks)
    assert times == {"a": [1.0]}


def test_warming_names_the_broken_the_wrong_and_the_unreached(ticks):
    def prepared(value):
        return measure.Prepared(lambda: 1 / value, lambda y: [np.array(y)])

    some = {"a": prepared(1), "broken": prepared(0), "b": prepared(2), "late": prepared(1)}
    failed = measure.warm(some, measure.Agreement(), 3.0, ticks)
    assert failed == {
        "broken": "failed: ZeroDivisionError: division by zero",
        "b": "failed: its result is 0.5 of the norm away from a's",
        "late": "not run: budget",
    }


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([1.0, 2.02], None),
        ([1.0, 3.0], "failed: its result is 0.45 of the norm away from a's"),
        ([1.0, math.nan], "failed: its result is nan of the norm away from a's"),
        ([1.0, 2.0, 3.0], "failed: its result has other shapes than a's"),
    ],
)
def test_agreement(second, said):
    agreement = measure.Agreement()
    assert agreement("a", [np.array([1.0, 2.0])]) is None
    assert agreement("b", [np.array(second)]) == said


def test_what_is_not_finite_is_no_measure_for_others():
    agreement = measure.Agreement()
    assert agreement("a", [np.array([np.inf])]) == "failed: its result is not finite"
    assert agreement("b", [np.array([1.0])]) is None


def test_a_part_of_the_budget_leaves_the_rest_to_the_others():
    now = [0.0]
    budget = measure.Budget(12.0, 3, lambda: now[0])
    assert budget.share() == 4.0
    now[0] = 2.0
    assert budget.share() == 7.0
    now[0] = 20.0
    assert budget.share() == 20.0


def test_describe_and_ratio():
    assert measure.describe([5, 1, 4, 2, 3]) == {
        "median": 3, "quartiles": [2, 4], "rounds": 5, "times": [5, 1, 4, 2, 3],
    }  # fmt: skip
    assert measure.ratio([4.0, 6.0, 9.0], [2.0, 2.0, 3.0]) == {"ratio": 3.0, "quartiles": [2.5, 3]}
    # the second round was slow for both
    assert measure.ratio([2.0, 20.0, 2.0, 2.0], [1.0, 10.0, 1.0, 4.0])["ratio"] == 2.0
    assert measure.quartiles([7.0]) == [7.0, 7.0]


def test_both_passes_gives_the_output_and_the_gradient_by_floating_arrays_alone():
    arrays = [jnp.array([2.0, 3.0]), jnp.array([1, 2]), jnp.array([5.0, 7.0])]
    passes = measure.both_passes(lambda x, n, z: x**2 * n + z, arrays)
    y, gradients = passes(*arrays, jnp.array([1.0, 10.0]))
    assert y.tolist() == [9.0, 25.0]
    assert [g.tolist() for g in gradients] == [[4.0, 120.0], [1.0, 10.0]]


def test_nothing_is_folded():
    passes = measure.both_passes(lambda x: 3 * x, [jnp.ones(4)])
    text = jax.jit(passes).lower(jnp.ones(4), jnp.ones(4)).as_text()
    signature = next(line for line in text.splitlines() if "@main" in line)
    # x is not used by the gradient, dy by nothing else: both are arguments
    assert signature.count("tensor<4xf32>") >= 4


def test_prepare_says_what_it_needs(monkeypatch):
    x = jnp.ones((64, 64))
    one = measure.prepare(lambda x: jnp.sum(jnp.sort(x @ x, axis=0)), [x])
    assert (one.temp_bytes or 0) >= x.nbytes and (one.compile_seconds or 0) > 0
    assert one.values(one.run())[0].tolist() == [64.0**3]
    monkeypatch.setattr(measure, "free_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="GB of temporaries, 0.0 are free"):
        measure.prepare(lambda x: jnp.sum(jnp.sort(x @ x, axis=0)), [x])


def test_a_sample_falls_on_every_column():
    whole = np.arange(2**24).reshape(-1, 4096)
    taken = measure.sample(whole)
    assert 2**20 < taken.size <= 2**22 and len(np.unique(taken % 4096)) == 4096
    assert measure.sample(np.arange(6).reshape(2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
