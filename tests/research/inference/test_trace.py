"""Traces and the simulation of their scheduling, against closed forms and another algorithm."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layers.config import ConfigError
from research.inference.trace import (
    Lengths,
    Work,
    blocks,
    draw_trace,
    powers_of_two,
    preallocated,
    simulate,
)

TRACES = st.lists(st.builds(Work, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12)


def test_lengths_are_lognormal():
    drawn = Lengths(3.8, 0.8, most=10**6).draw(20_000, np.random.default_rng(0))
    # rounded up: the distribution function at an integer is that of the law
    for length in (20, 45, 120):
        below = np.mean(np.array(drawn) <= length)
        assert below == pytest.approx(stats.lognorm(0.8, scale=np.exp(3.8)).cdf(length), abs=0.01)


def test_lengths_are_rounded_up_and_clipped():
    drawn = Lengths(3.0, 2.0, most=64, least=16, multiple=8).draw(500, np.random.default_rng(0))
    assert {min(drawn), max(drawn)} == {16, 64}
    assert all(length % 8 == 0 for length in drawn)
    assert Lengths(np.log(17.0).item(), 0.0, most=64, multiple=8).draw(
        1, np.random.default_rng(0)
    ) == [24]


def test_a_trace_is_that_of_its_seed():
    lengths = Lengths(3.0, 1.0, most=100)
    trace = draw_trace(20, lengths, lengths, seed=1)
    assert trace == draw_trace(20, lengths, lengths, seed=1)
    assert trace != draw_trace(20, lengths, lengths, seed=2)
    assert [work.prompt for work in trace] != [work.new for work in trace]


@given(TRACES, st.integers(1, 5))
def test_steps_are_those_of_the_groups_and_of_a_list_schedule(trace, slots):
    groups = [trace[i : i + slots] for i in range(0, len(trace), slots)]
    static = simulate(trace, slots, static=True)
    assert static.steps == sum(max(work.new for work in group) for group in groups)
    # each request begins when the first slot is free
    ends = [0] * slots
    for work in trace:
        heapq.heappush(ends, heapq.heappop(ends) + work.new)
    continuous = simulate(trace, slots)
    assert continuous.steps == max(ends) <= static.steps
    assert continuous.rows == static.rows == sum(work.new for work in trace)


@given(TRACES, st.integers(1, 5), st.booleans())
def test_used_slots_do_not_depend_on_the_schedule(trace, slots, static):
    sizes = [work.prompt + i for work in trace for i in range(1, work.new + 1)]
    found = simulate(trace, slots, blocks(16), static=static)
    assert found.used == sum(sizes)
    assert found.allocated == sum(16 * int(np.ceil(size / 16)) for size in sizes)
    assert found.preemptions == 0


@pytest.mark.parametrize(
    "allocate, slots",
    [
        (preallocated(64), [64, 64, 64, 64, 64]),
        (powers_of_two, [1, 2, 4, 8, 64]),
        (blocks(16), [16, 16, 16, 16, 48]),
        (blocks(1), [1, 2, 3, 8, 33]),
    ],
)
def test_allocations(allocate, slots):
    assert [allocate(tokens) for tokens in (1, 2, 3, 8, 33)] == slots


def test_the_order_of_waste_is_that_of_the_paper():
    """Kwon 2023, Figure 2: reserving the maximum wastes most, small blocks least."""
    trace = draw_trace(200, Lengths(4.5, 0.8, 1024), Lengths(5.0, 0.8, 1024), seed=0)
    policies = (preallocated(2048), blocks(256), powers_of_two, blocks(16))
    worst, *between, best = (simulate(trace, 8, policy).utilisation for policy in policies)
    assert worst < 0.4 < min(between) and max(between) < 0.9 < best


@given(TRACES, st.integers(80, 200), st.sampled_from([blocks(1), blocks(16)]))
def test_a_small_memory_is_never_exceeded_and_loses_no_token(trace, memory, allocate):
    found = simulate(trace, 8, allocate, memory=memory)
    assert found.allocated <= found.steps * memory
    tokens = sum(work.new for work in trace)
    assert found.rows >= tokens and (found.rows == tokens) == (found.preemptions == 0)


def test_the_last_that_began_is_preempted_and_begins_again():
    # two rows of 4 tokens grow by 4 in 12 slots: after 2 steps the second gives its slots back
    found = simulate([Work(4, 4), Work(4, 4)], 2, memory=12)
    assert (found.steps, found.rows, found.preemptions) == (8, 10, 1)
    # it waits before a third one, which has room first
    found = simulate([Work(4, 4), Work(4, 3), Work(1, 6)], 2, memory=12)
    assert (found.steps, found.rows, found.preemptions) == (10, 15, 1)


def test_more_rows_fit_in_the_same_memory_by_pages():
    trace = draw_trace(60, Lengths(3.0, 0.5, 64), Lengths(3.8, 0.8, 192), seed=0)
    whole, paged = (
        simulate(trace, slots, allocate, memory=512)
        for slots, allocate in ((2, preallocated(256)), (8, blocks(16)))
    )
    assert paged.steps < whole.steps / 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: simulate([Work(1, 1)], 0), "slots=0: must be > 0"),
        (
            lambda: simulate([Work(1, 1), Work(30, 3)], 1, blocks(16), memory=32),
            r"trace\[1\]=\(30, 3\): requires 48 slots, memory=32",
        ),
        (lambda: Lengths(1.0, -1.0, 4), "spread=-1.0: must be ≥ 0"),
        (lambda: Lengths(1.0, 1.0, 4, least=5), r"least=5: must be in \[1, most=4\]"),
        (lambda: Lengths(1.0, 1.0, 4, multiple=0), "multiple=0: must be > 0"),
        (lambda: draw_trace(0, Lengths(1.0, 1.0, 4), Lengths(1.0, 1.0, 4), 0), "count=0"),
    ],
)
def test_impossible_arguments_are_one_line(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
