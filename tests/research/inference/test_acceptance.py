"""Acceptance rates and output laws, against enumeration and samples of a known law."""

import itertools

import numpy as np
import pytest

from layers.config import ConfigError
from research.inference.acceptance import (
    acceptance,
    expected_tokens,
    overlap,
    total_variation,
    total_variation_by_chance,
)


def test_expected_tokens_is_the_sum_over_all_outcomes():
    rates = [0.9, 0.5, 0.7]
    expected = 0.0
    for outcome in itertools.product((True, False), repeat=3):
        pairs = zip(rates, outcome, strict=True)
        probability = np.prod([rate if kept else 1 - rate for rate, kept in pairs])
        expected += probability * (1 + len(list(itertools.takewhile(bool, outcome))))
    assert expected_tokens(rates) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha, drafted", [(0.75, 7), (0.6, 2), (0.0, 3)])
def test_equal_rates_give_equation_1(alpha, drafted):
    closed = (1 - alpha ** (drafted + 1)) / (1 - alpha)
    assert expected_tokens([alpha] * drafted) == pytest.approx(closed, rel=1e-12)


def test_rates_are_conditional_on_the_positions_before():
    # accepted 0, 1, 3, 3 of 3: of 4 passes 3 accept the first, of those 2 the second
    assert acceptance([1, 2, 4, 4], 3) == [3 / 4, 2 / 3, 1.0]
    assert acceptance([1, 1], 2) == [0.0, 0.0]


def test_rates_and_expected_tokens_invert_each_other():
    rates = np.array([0.9, 0.6, 0.8, 0.3])
    draws = np.random.default_rng(0).random((100_000, 4)) < rates
    tokens = 1 + np.cumprod(draws, axis=1).sum(axis=1)
    assert acceptance(tokens.tolist(), 4) == pytest.approx(rates.tolist(), abs=0.01)
    assert expected_tokens(acceptance(tokens.tolist(), 4)) == pytest.approx(tokens.mean(), rel=1e-9)


@pytest.mark.parametrize("tokens", [[], [0, 1], [2, 5]])
def test_tokens_that_no_pass_yields_are_refused(tokens):
    with pytest.raises(ConfigError, match="must be from 1 to 4 a pass"):
        acceptance(tokens, 3)


def test_overlap_is_the_probability_that_a_draft_is_accepted():
    random = np.random.default_rng(0)
    target, draft = random.dirichlet(np.ones(3), 5), random.dirichlet(np.ones(3), 5)
    # a drafted token is accepted with probability min(1, p / q) (Leviathan 2023, §2.3)
    accepted = np.sum(draft * np.minimum(1, target / draft), axis=1)
    assert overlap(target, draft) == pytest.approx(accepted.mean(), rel=1e-12)
    assert overlap(target, target) == pytest.approx(1)


def test_total_variation_is_that_of_each_position():
    samples = np.array([[0, 1], [0, 1], [2, 1], [2, 1]])
    others = np.array([[0, 1], [0, 0], [0, 1], [0, 0]])
    assert total_variation(samples, others, 3) == pytest.approx((0.5 + 0.5) / 2)
    assert total_variation(samples, samples, 3) == 0


def test_chance_separates_equal_laws_from_others():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(20))
    # the law of drafts that are always accepted, one time in five
    q = 0.8 * p + 0.2 * random.dirichlet(np.ones(20))
    one, other = (random.choice(20, (1000, 8), p=p) for _ in range(2))
    wrong = random.choice(20, (1000, 8), p=q)
    pooled = np.concatenate((one, other))
    chance = total_variation_by_chance(pooled, 20, count=1000)
    ratios = []
    for _ in range(20):
        pair = [random.choice(20, (1000, 8), p=p) for _ in range(2)]
        ratios.append(total_variation(*pair, 20) / chance)
    assert np.mean(ratios) < 1 and np.mean(np.array(ratios) > 1) <= 0.25
    assert total_variation(wrong, one, 20) > 1.1 * chance
