"""How many drafted tokens a target accepts, and whether its output law stays: speculative decoding.

Leviathan 2023 (arXiv:2211.17192). A pass of the target checks ``γ`` drafted tokens and yields one
token more than it accepts. The numbers here come from the tokens of each pass, or from the two
models' distributions; nothing is drafted here.
"""

from collections.abc import Sequence

import numpy as np

from layers.config import check


def overlap(target_pv: np.ndarray, draft_pv: np.ndarray) -> float:
    """The acceptance rate ``α = E[Σ_v min(p(v), q(v))]`` (corollary 3.6) over contexts ``p``."""
    return float(np.mean(np.sum(np.minimum(target_pv, draft_pv), axis=-1)))


def acceptance(tokens: Sequence[int], drafted: int) -> list[float]:
    """The rate at which the drafted token at each position is accepted, given all before it.

    ``tokens``: of each pass, accepted ones and one more; ``drafted``: ``γ``. A position that no
    pass reached has rate 0.
    """
    accepted = np.asarray(tokens) - 1
    within = accepted.size > 0 and accepted.min() >= 0 and accepted.max() <= drafted
    check(bool(within), "tokens", list(tokens)[:8], f"must be from 1 to {drafted + 1} a pass")
    reached = np.array([np.sum(accepted >= i) for i in range(drafted + 1)])
    return (reached[1:] / np.maximum(reached[:-1], 1)).tolist()


def expected_tokens(rates: Sequence[float]) -> float:
    """Tokens of a pass whose drafts are accepted at ``rates``: ``1 + Σ_i Π_{j ≤ i} rate_j``.

    Equal rates give equation 1, ``(1 − α^{γ+1}) / (1 − α)``.
    """
    return float(1 + np.sum(np.cumprod(rates)))


def total_variation(samples_nt: np.ndarray, others_nt: np.ndarray, vocab: int) -> float:
    """``½ Σ_v |p(v) − p'(v)|`` between the tokens at a position of two samples, mean over time."""
    difference = _frequencies(samples_nt, vocab) - _frequencies(others_nt, vocab)
    return float(0.5 * np.abs(difference).sum(axis=1).mean())


def total_variation_by_chance(
    samples_nt: np.ndarray, vocab: int, *, count: int, resamples: int = 200, seed: int = 0
) -> float:
    """What `total_variation` of two samples of ``count`` rows of one law exceeds in 5% of cases.

    Bootstrap: both are drawn with replacement from the rows of ``samples_nt``, of that law.
    """
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        one, other = random.integers(0, len(samples_nt), (2, count))
        drawn.append(total_variation(samples_nt[one], samples_nt[other], vocab))
    return float(np.quantile(drawn, 0.95))


def _frequencies(samples_nt: np.ndarray, vocab: int) -> np.ndarray:
    """The relative frequency of each token at each position, ``[t, v]``."""
    n, t = samples_nt.shape
    cells = samples_nt + vocab * np.arange(t)
    return np.bincount(cells.ravel(), minlength=t * vocab).reshape(t, vocab) / n
