"""Verifies drafted tokens so that the law of the output is the target's own.

Chain rejection sampling, Leviathan 2023 (arXiv:2211.17192), Algorithm 1.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.inference.sampling import SamplingRows, probabilities, sample

_ACCEPT, _RESAMPLE = 1, 2  # streams of random numbers beside that of `sample`


class Verified(NamedTuple):
    """``accepted_b``: how many of a row's drafts are kept; ``token_b``: the token after them."""

    accepted_b: jax.Array
    token_b: jax.Array


def verify(
    logits_btv: jax.Array,
    drafts_bt: jax.Array,
    draft_probabilities_btv: jax.Array | None,
    position_b: jax.Array,
    rows: SamplingRows,
    *,
    count_b: jax.Array | None = None,
    allowed_btv: jax.Array | None = None,
) -> Verified:
    """How many drafts of each row are accepted, and the token that follows these, both int32.

    With p the target's law of a token (`probabilities`: with the row's penalties, temperature and
    filters) and q the law by which the draft x was drawn, x is accepted with probability
    min(1, p(x) / q(x)). The first draft that is not accepted is replaced by a token from
    max(0, p − q), normalised; after accepted drafts a token from p follows. A row with temperature
    0 accepts a draft while it is the likeliest token.

    Drafts without probabilities are those of a deterministic draft: q is one-hot. Then a draft is
    accepted if it is the token that `sample` draws, which is the same law, and the tokens are those
    without speculation.

    Random numbers are keyed by (seed, index, position), in other streams than those of `sample`, so
    that a draft may be drawn by `sample`.

    Args:
      logits_btv: of the target, after no, one, … all γ drafts: ``[b, γ + 1, v]``.
      drafts_bt: int32 ``[b, γ]``.
      draft_probabilities_btv: ``[b, γ, v]``, or None.
      position_b: the position of the first draft.
      rows: the settings, with the tokens before the drafts counted.
      count_b: the first ``count`` drafts of a row are verified; None: all.
      allowed_btv: bool ``[b, γ + 1, v]``, see `sample`; None: all tokens.
    """
    b, t, _ = logits_btv.shape
    drafts_tb = jnp.pad(drafts_bt, ((0, 0), (0, 1))).T
    count_b = jnp.full(b, t - 1) if count_b is None else count_b

    def step(carry, inputs):
        rows, chain_b, accepted_b, token_b = carry  # chain: all drafts so far are accepted
        index, logits_bv, draft_b, q_bv, allowed_bv = inputs
        is_draft_b = index < count_b
        at_b = position_b + index
        if q_bv is None:
            next_b = sample(logits_bv, at_b, rows, allowed_bv).token_b
            accepts_b = next_b == draft_b
        else:
            p_bv = probabilities(logits_bv, rows, allowed_bv)
            q_bv = jnp.where(is_draft_b[:, None], q_bv, 0)
            accepts_b, next_b = _accept_or_resample(p_bv, q_bv, draft_b, rows.keys(at_b))
        accepts_b &= chain_b & is_draft_b
        token_b = jnp.where(chain_b & ~accepts_b, next_b, token_b)
        carry = rows.counted(draft_b, accepts_b), accepts_b, accepted_b + accepts_b, token_b
        return carry, None

    none_b = jnp.zeros(b, jnp.int32)
    q_tbv = None
    if draft_probabilities_btv is not None:
        q_tbv = jnp.pad(draft_probabilities_btv, ((0, 0), (0, 1), (0, 0))).swapaxes(0, 1)
    inputs = (
        jnp.arange(t),
        logits_btv.swapaxes(0, 1),
        drafts_tb,
        q_tbv,
        None if allowed_btv is None else allowed_btv.swapaxes(0, 1),
    )
    rows = dataclasses.replace(rows, counts_bv=jnp.asarray(rows.counts_bv))
    start = rows, jnp.ones(b, bool), none_b, none_b
    (_, _, accepted_b, token_b), _ = jax.lax.scan(step, start, inputs)
    return Verified(accepted_b, token_b)


def _accept_or_resample(
    p_bv: jax.Array, q_bv: jax.Array, draft_b: jax.Array, keys_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether each draft is accepted, and the token to take if it is not."""

    def one(p_v, q_v, draft, key):
        uniform = jax.random.uniform(jax.random.fold_in(key, _ACCEPT))
        residual_v = jnp.maximum(p_v - q_v, 0)
        # p = q up to rounding: no draft is rejected but by rounding
        residual_v = jnp.where(jnp.any(residual_v > 0), residual_v, p_v)
        token = jax.random.categorical(jax.random.fold_in(key, _RESAMPLE), jnp.log(residual_v))
        return uniform * q_v[draft] < p_v[draft], token.astype(jnp.int32)

    return jax.vmap(one)(p_bv, q_bv, draft_b, keys_b)
