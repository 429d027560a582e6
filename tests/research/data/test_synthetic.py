"""Tasks: the answer follows from the tokens before it, at the distance asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.config import ConfigError
from research.data import TASKS, SyntheticConfig
from research.data.synthetic import generate


@pytest.mark.parametrize("task", TASKS)
@given(length=st.integers(12, 60), vocab_size=st.integers(12, 80), seed=st.integers(0, 2**40))
def test_shape_dtype_range_and_seed(task, length, vocab_size, seed):
    tokens, weights, _ = generate(task, (seed, 1), length, vocab_size, {})
    assert tokens.shape == weights.shape == (length,)
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
    assert 0 <= tokens.min() and tokens.max() < vocab_size
    assert set(weights) == {0.0, 1.0} and weights[0] == 0 and weights[-1] == 1
    again, _, _ = generate(task, (seed, 1), length, vocab_size, {})
    np.testing.assert_array_equal(tokens, again)


@given(length=st.integers(3, 60), data=st.data())
def test_copy(length, data):
    symbols = data.draw(st.integers(1, (length - 1) // 2))
    tokens, weights, _ = generate("copy", (0, length), length, 20, {"symbols": symbols})
    assert weights.sum() == symbols
    for at in np.flatnonzero(weights):
        assert tokens[at] == tokens[at - symbols - 1] >= 2
    assert tokens[length - symbols - 1] == 1


@given(length=st.integers(5, 60), data=st.data())
def test_selective_copy(length, data):
    symbols = data.draw(st.integers(1, (length - 1) // 2))
    parameters = {"symbols": symbols}
    tokens, weights, _ = generate("selective_copy", (0, length), length, 20, parameters)
    start = length - symbols
    np.testing.assert_array_equal(np.flatnonzero(weights), np.arange(start, length))
    assert tokens[start - 1] == 1
    shown = tokens[: start - 1]
    np.testing.assert_array_equal(shown[shown > 0], tokens[start:])


def test_selective_copies_stand_anywhere():
    found = [generate("selective_copy", (s,), 30, 20, {"symbols": 2})[0] for s in range(200)]
    places = {int(i) for tokens in found for i in np.flatnonzero(tokens[:27])}
    assert places == set(range(27))


@given(length=st.integers(2, 40), symbols=st.integers(2, 5), swaps=st.integers(0, 1))
def test_word_problem(length, symbols, swaps):
    """By applying each permutation to things in a row."""
    parameters = {"symbols": symbols, "swaps": swaps}
    tokens, weights, answers = generate("word_problem", (length,), length, 120, parameters)
    elements = list(itertools.permutations(range(symbols)))
    np.testing.assert_array_equal(weights, [0] + [1] * (length - 1))
    state = list(range(symbols))
    for i in range(length):
        if i:
            assert elements[answers[i]] == tuple(state)
        permutation = elements[tokens[i]]
        state = [permutation[s] for s in state]
        moved = [s for s in range(symbols) if permutation[s] != s]
        assert not swaps or (len(moved) == 2 and moved[1] - moved[0] == 1)


@settings(max_examples=200)
@given(
    length=st.integers(12, 80),
    queries=st.integers(1, 3),
    pairs=st.integers(3, 5),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_associative_recall(length, queries, pairs, seed, data):
    start = length - 2 * queries
    distance = data.draw(st.none() | st.integers(2 * queries - 1, start - 1))
    slots = (start - ((start - (distance or 0) - (distance is not None)) % 2)) // 2
    if pairs > slots:
        return
    tokens, weights, _ = generate(
        "associative_recall",
        (seed,),
        length,
        21,
        {"pairs": pairs, "queries": queries, "distance": distance},
    )
    answers = np.flatnonzero(weights)
    np.testing.assert_array_equal(answers, start + 1 + 2 * np.arange(queries))
    shown = np.flatnonzero((tokens[:start] >= 1) & (tokens[:start] <= 10))
    assert len(shown) == len(set(tokens[shown])) == pairs
    assert (tokens[shown + 1] >= 11).all()
    assert (tokens[:start] > 0).sum() == 2 * pairs
    for answer in answers:
        (key,) = [k for k in shown if tokens[k] == tokens[answer - 1]]
        assert tokens[key + 1] == tokens[answer]
        if distance is not None:
            assert (answer - 1) - (key + 1) == distance


@given(length=st.integers(4, 60), seed=st.integers(0, 999), data=st.data())
def test_induction(length, seed, data):
    distance = data.draw(st.none() | st.integers(1, length - 3))
    tokens, weights, _ = generate("induction", (seed,), length, 9, {"distance": distance})
    first, query = np.flatnonzero(tokens == 0)
    assert query == length - 2 and weights.sum() == 1
    assert tokens[first + 1] == tokens[-1]
    if distance is not None:
        assert query - (first + 1) == distance


@given(length=st.integers(6, 60), seed=st.integers(0, 999), data=st.data())
def test_induction_of_many(length, seed, data):
    queries = data.draw(st.integers(2, (length - 2) // 2))
    tokens, weights, _ = generate("induction", (seed,), length, 9, {"queries": queries})
    triggers = np.flatnonzero(tokens == 0)
    assert len(triggers) == queries + 1 and triggers[-1] == length - 2
    assert len(set(tokens[triggers + 1])) == 1
    np.testing.assert_array_equal(np.flatnonzero(weights), triggers[1:] + 1)


def test_distances_and_values_vary():
    gaps = set()
    for seed in range(200):
        tokens, _, _ = generate("induction", (seed,), 16, 9, {})
        first, query = np.flatnonzero(tokens == 0)
        gaps.add(int(query - first - 1))
    assert gaps == set(range(1, 14))


@pytest.mark.parametrize(
    "task, length, parameters, message",
    [
        ("cpoy", 16, {}, "task='cpoy': .*did you mean 'copy'"),
        ("copy", 16, {"symbols": 8}, r"parameters.symbols=8: must be in \[1, 7\] for length 16"),
        ("selective_copy", 9, {"symbols": 5}, r"parameters.symbols=5: must be in \[1, 4\]"),
        ("word_problem", 9, {"symbols": 5}, "parameters.symbols=5: 120 permutations require"),
        ("induction", 9, {"queries": 4}, r"parameters.queries=4: must be in \[1, 3\]"),
        ("induction", 9, {"queries": 2, "distance": 3}, "parameters.distance=3: must be None"),
        ("word_problem", 9, {"swaps": 2}, "parameters.swaps=2: must be 0 or 1"),
        ("copy", 16, {"symbol": 8}, "parameters.symbol=8: task 'copy' takes symbols"),
        ("copy", 16, {"symbols": 1.5}, "parameters.symbols=1.5: must be an integer"),
        (
            "associative_recall",
            16,
            {"distance": 14},
            r"parameters.distance=14: must be in \[1, 13\]",
        ),
        ("associative_recall", 16, {"queries": 5}, r"parameters.queries=5: must be in \[1, 4\]"),
        ("associative_recall", 16, {"pairs": 8}, r"parameters.pairs=8: must be in \[1, 7\]"),
        (
            "associative_recall",
            16,
            {"queries": 2, "pairs": 1},
            r"parameters.pairs=1: must be in \[2,",
        ),
        ("induction", 16, {"distance": 14}, r"parameters.distance=14: must be in \[1, 13\]"),
        ("induction", 3, {}, "which must be at least 4"),
    ],
)
def test_impossible_tasks_are_refused(task, length, parameters, message):
    with pytest.raises(ConfigError, match=message):
        generate(task, (0,), length, 32, parameters)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "x"}, "task='x'"),
        ({"vocab_size": 3}, "vocab_size=3: must be at least 4"),
        ({"parameters": [1]}, r"parameters=\[1\]: must be a mapping"),
        ({"examples": 0}, "examples=0"),
        ({"validation_examples": 0}, "validation_examples=0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticConfig(**options)
