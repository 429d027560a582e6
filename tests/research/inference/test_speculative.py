"""Verification of drafts: exact laws by enumeration in float64, and the tokens without drafts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.inference import SamplingConfig, SamplingRows, sample
from research.inference.sampling import probabilities
from research.inference.speculative import verify

V, DRAFTS = 3, 2
RANDOM = np.random.default_rng(0)
# logits after each beginning: of the target after 0, 1 and 2 tokens, of the draft after 0 and 1
TARGET = [RANDOM.normal(size=(*[V] * n, V)).astype(np.float32) * 1.5 for n in range(DRAFTS + 1)]
DRAFT = [RANDOM.normal(size=(*[V] * n, V)).astype(np.float32) * 1.5 for n in range(DRAFTS)]
SETTINGS = {
    "plain": dict(),
    "tempered, filtered, penalised": dict(
        temperature=1.4, top_p=0.9, presence_penalty=0.8, frequency_penalty=-0.3
    ),
}

verified, draw, law = jax.jit(verify), jax.jit(sample), jax.jit(probabilities)


def rows_of(count, **options):
    """Rows of one configuration with indices 0, 1, …"""
    one = SamplingRows.of(SamplingConfig(**options), V)
    rows = jax.tree.map(lambda a: np.repeat(a, count, axis=0), one)
    return dataclasses.replace(rows, index_b=np.arange(count, dtype=np.int32))


def exact(logits, before, options):
    """The probabilities after the tokens ``before``, float64."""
    counts = np.bincount(before, minlength=V)
    scores = logits.astype(np.float64) - counts * options.get("frequency_penalty", 0)
    scores = (scores - (counts > 0) * options.get("presence_penalty", 0)) / options.get(
        "temperature", 1
    )
    weights = np.exp(scores - scores.max())
    likelier = np.array([weights[weights > w].sum() for w in weights])
    weights[likelier >= options.get("top_p", 1) * weights.sum()] = 0
    return weights / weights.sum()


def target_law(before, options):
    return exact(TARGET[len(before)][tuple(before)], before, options)


def algorithm_1(options, start=()):
    """{(tokens, number accepted): probability} of Leviathan's Algorithm 1, by enumeration."""
    if len(start) == DRAFTS:
        return {((*start, x), DRAFTS): p for x, p in enumerate(target_law(start, options))}
    outcomes = {}
    p, q = target_law(start, options), exact(DRAFT[len(start)][start], start, {})
    rejected = 1 - np.minimum(p, q).sum()
    residual = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()
    for x in range(V):
        outcomes[((*start, x), len(start))] = rejected * residual[x]
        accepted = min(p[x], q[x])
        for outcome, probability in algorithm_1(options, (*start, x)).items():
            outcomes[outcome] = accepted * probability
    return outcomes


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_algorithm_1_has_the_law_of_the_target(options):
    """The oracle itself: emitted tokens, continued by the target, are the target's sequences."""
    law = np.zeros((V,) * (DRAFTS + 1))
    for (tokens, _), probability in algorithm_1(options).items():
        for more in itertools.product(range(V), repeat=DRAFTS + 1 - len(tokens)):
            sequence, factor = list(tokens), probability
            for x in more:
                factor *= target_law(tuple(sequence), options)[x]
                sequence.append(x)
            law[tuple(sequence)] += factor
    for sequence in itertools.product(range(V), repeat=DRAFTS + 1):
        parts = [target_law(sequence[:n], options)[x] for n, x in enumerate(sequence)]
        assert abs(law[sequence] - np.prod(parts)) < 1e-12


def drafted(count):
    """Drafts from the draft's law, its probabilities, and the target's logits along them."""
    random, drafts = np.random.default_rng(1), np.zeros((count, 0), int)
    laws, logits = [], [np.tile(TARGET[0], (count, 1))]
    for n in range(DRAFTS):
        q = np.array([exact(DRAFT[n][tuple(x)], (), {}) for x in np.ndindex((V,) * n)])
        q = q.reshape(*[V] * n, V)[tuple(drafts.T)] * np.ones((count, 1))
        drawn = (random.random((count, 1)) > q.cumsum(-1)).sum(-1)
        drafts = np.column_stack((drafts, np.minimum(drawn, V - 1)))
        laws.append(q.astype(np.float32))
        logits.append(TARGET[n + 1][tuple(drafts.T)])
    return np.stack(logits, 1), drafts.astype(np.int32), np.stack(laws, 1)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_the_law_of_what_is_emitted_is_that_of_algorithm_1(options):
    count = 40_000
    logits, drafts, laws = drafted(count)
    got = verified(logits, drafts, laws, np.full(count, 5), rows_of(count, **options))
    seen: dict = {}
    for draft, accepted, token in zip(
        drafts.tolist(), *map(np.ndarray.tolist, map(np.asarray, got)), strict=True
    ):
        outcome = ((*draft[:accepted], token), accepted)
        seen[outcome] = seen.get(outcome, 0) + 1
    want = {o: p for o, p in algorithm_1(options).items() if p > 0}
    assert set(seen) <= set(want) and len(want) > 20
    observed = [seen.get(outcome, 0) for outcome in want]
    assert stats.chisquare(observed, np.array(list(want.values())) * count).pvalue > 0.01


def test_the_mean_number_of_tokens_is_that_of_the_paper():
    """(1 − α^(γ+1)) / (1 − α), Eq. 1, if every draft is accepted with probability α."""
    count, gamma = 20_000, 4
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    alpha = np.minimum(p, q).sum()
    drafts = np.random.default_rng(2).choice(V, (count, gamma), p=q).astype(np.int32)
    logits = np.tile(np.log(p), (count, gamma + 1, 1)).astype(np.float32)
    laws = np.tile(q, (count, gamma, 1)).astype(np.float32)
    got = verified(logits, drafts, laws, np.zeros(count, np.int32), rows_of(count))
    tokens = 1 + np.asarray(got.accepted_b)
    assert abs(tokens.mean() - (1 - alpha**5) / (1 - alpha)) < 4 * tokens.std() / count**0.5


BATCH, GAMMA, WIDE = 12, 4, 7
LOGITS = RANDOM.normal(size=(BATCH, GAMMA + 1, WIDE)).astype(np.float32) * 2
MIXED = [
    dict(temperature=0),
    dict(temperature=0, repetition_penalty=1.8, frequency_penalty=1.0),
    dict(seed=3),
    dict(top_k=3, presence_penalty=1.5, seed=4, temperature=0.5),
] * (BATCH // 4)


def mixed_rows():
    ones = [
        SamplingRows.of(SamplingConfig(**options), WIDE, [0, 2], index)
        for index, options in enumerate(MIXED)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *ones)


def alone(allowed_btv=None):
    """Tokens one at a time by `sample`, of the logits that do not depend on them."""
    rows, tokens = mixed_rows(), []
    for n in range(GAMMA + 1):
        allowed = None if allowed_btv is None else allowed_btv[:, n]
        tokens.append(draw(LOGITS[:, n], np.full(BATCH, 9 + n), rows, allowed).token_b)
        rows = rows.counted(tokens[-1], jnp.ones(BATCH, bool))
    return np.stack(tokens, 1)


@pytest.mark.parametrize("constrained", [False, True])
def test_deterministic_drafts_change_no_token(constrained):
    """Greedy or drawn, with penalties that count the drafts: the tokens are those of `sample`."""
    allowed = RANDOM.random(LOGITS.shape) < 0.6 if constrained else None
    if allowed is not None:
        allowed[:, :, 0] = True
    want = alone(allowed)
    for correct in range(GAMMA + 1):  # drafts that are right so far
        drafts = want[:, :GAMMA].copy()
        drafts[:, correct:] = (drafts[:, correct:] + 1) % WIDE
        for count in (GAMMA, 2, 0):
            got = verified(
                LOGITS, drafts, None, np.full(BATCH, 9), mixed_rows(),
                count_b=np.full(BATCH, count), allowed_btv=allowed,
            )  # fmt: skip
            accepted = min(correct, count)
            assert got.accepted_b.tolist() == [accepted] * BATCH
            np.testing.assert_array_equal(got.token_b, want[:, accepted])


def test_greedy_rows_accept_while_the_draft_is_the_likeliest():
    """Whatever the draft's probabilities; the tokens are those of the target alone."""
    rows, want = mixed_rows(), alone()
    greedy = np.array([options.get("temperature") == 0 for options in MIXED])
    drafts = want[:, :GAMMA].copy()
    drafts[::2, 2] = (drafts[::2, 2] + 1) % WIDE
    laws = RANDOM.dirichlet(np.ones(WIDE), (BATCH, GAMMA)).astype(np.float32)
    got = verified(LOGITS, drafts, laws, np.full(BATCH, 9), rows)
    accepted = np.where(np.arange(BATCH) % 2 == 0, 2, GAMMA)
    np.testing.assert_array_equal(got.accepted_b[greedy], accepted[greedy])
    np.testing.assert_array_equal(got.token_b[greedy], want[np.arange(BATCH), accepted][greedy])


def test_a_row_does_not_depend_on_the_rows_beside_it():
    drafts = RANDOM.integers(0, WIDE, (BATCH, GAMMA)).astype(np.int32)
    laws = RANDOM.dirichlet(np.ones(WIDE), (BATCH, GAMMA)).astype(np.float32)
    rows, position = mixed_rows(), np.arange(BATCH)
    want = verified(LOGITS, drafts, laws, position, rows)
    for row in (2, 3):
        others = (-LOGITS, drafts[::-1].copy(), laws[::-1].copy(), position[::-1].copy())
        for mine, other in zip((LOGITS, drafts, laws, position), others, strict=True):
            other[row] = mine[row]
        only = jax.tree.map(lambda a: np.asarray(a)[row : row + 1], rows)  # noqa: B023
        beside = jax.tree.map(lambda a: np.flip(a, 0), rows).set_row(row, only)
        got = verified(*others, beside)
        assert (got.accepted_b[row], got.token_b[row]) == (want.accepted_b[row], want.token_b[row])


def test_a_draft_that_is_not_allowed_is_rejected():
    allowed = np.ones(LOGITS.shape, bool)
    allowed[:, 1, 4] = False
    drafts = np.full((BATCH, GAMMA), 4, np.int32)
    laws = np.tile(np.eye(WIDE, dtype=np.float32)[4], (BATCH, GAMMA, 1))
    logits = np.where(np.arange(WIDE) == 4, 30, LOGITS).astype(np.float32)
    for q in (laws, None):
        got = verified(
            logits, drafts, q, np.zeros(BATCH, np.int32), mixed_rows(), allowed_btv=allowed
        )
        assert set(got.accepted_b.tolist()) == {1} and 4 not in got.token_b.tolist()


def test_probabilities_are_those_of_sample():
    """One-hot in rows of temperature 0; the frequencies of `sample` in others."""
    rows = mixed_rows()
    got = np.asarray(law(LOGITS[:, 0], rows))
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
    tokens = draw(LOGITS[:, 0], np.zeros(BATCH, np.int32), rows).token_b
    assert got[0].max() == got[1].max() == 1
    assert np.all(got[np.arange(BATCH), tokens] > 0) and np.count_nonzero(got[3]) == 3
