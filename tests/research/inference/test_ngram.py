"""Prompt lookup against a search of the whole row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.config import ConfigError
from research.inference.ngram import NgramIndex


def search(tokens, least, most, count):
    for n in range(min(most, len(tokens) - 1), least - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + count]
    return []


@given(
    prompt=st.lists(st.integers(0, 2), max_size=20),
    new=st.lists(st.integers(0, 2), max_size=20),
    least=st.integers(1, 4),
    wider=st.integers(0, 3),
    count=st.integers(0, 5),
)
def test_drafts_are_those_of_a_search(prompt, new, least, wider, count):
    index = NgramIndex(prompt, least, least + wider)
    assert index.propose(count) == search(prompt, least, least + wider, count)
    for n, token in enumerate(new):
        index.extend([token])
        tokens = prompt + new[: n + 1]
        assert index.propose(count) == search(tokens, least, least + wider, count)


def test_the_longest_and_then_the_latest_match_counts():
    tokens = [1, 2, 3, 7, 9, 2, 3, 8, 3, 6, 1, 2, 3]
    assert NgramIndex(tokens, 1, 3).propose(2) == [7, 9]
    assert NgramIndex(tokens, 1, 2).propose(2) == [8, 3]
    assert NgramIndex(tokens, 1, 1).propose(9) == [6, 1, 2, 3]
    assert NgramIndex(tokens, 4, 5).propose(2) == NgramIndex([], 1, 5).propose(2) == []


@pytest.mark.parametrize("bounds", [(0, 2), (3, 2), (True, 2), (1, 2.0)])
def test_refuses_other_lengths(bounds):
    with pytest.raises(ConfigError) as raised:
        NgramIndex([], *bounds)
    assert str(raised.value) == f"ngram={bounds}: must be 1 ≤ least ≤ most"
