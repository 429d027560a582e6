"""Chooses the next token: temperature, top-k, top-p (Holtzman 2019), min-p (Nguyen 2024)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from layers.config import check, check_types


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How `generate` chooses tokens and when it stops.

    ``max_new_tokens``: the most new tokens for each prompt. ``temperature`` divides the logits; 0
    selects the likeliest token, with any filters. ``top_k``, ``top_p``, ``min_p``: see
    `filter_logits`; None: not used. ``stop_tokens``: ids that end a row. ``seed``: the same seed
    gives the same tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "must be > 0")
        check(self.temperature >= 0, "temperature", self.temperature, "must be ≥ 0")
        check(self.top_k is None or self.top_k > 0, "top_k", self.top_k, "must be > 0 or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            check(value is None or 0 < value <= 1, name, value, "must be in (0, 1] or None")
        for i, token in enumerate(self.stop_tokens):
            check(token >= 0, f"stop_tokens[{i}]", token, "must be ≥ 0")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")


def filter_logits(logits_bv: jax.Array, config: SamplingConfig) -> jax.Array:
    """(logits − their maximum) / temperature; −inf where a filter excludes the token.

    In this order, each filter on what the previous one left, as in transformers; float32
    ``[b, v]``:

    1. temperature (> 0 here);
    2. ``top_k``: the k likeliest;
    3. ``top_p``: the fewest likeliest tokens whose probabilities reach ``top_p`` together;
    4. ``min_p``: tokens at least ``min_p`` times as likely as the likeliest.

    The likeliest token always stays. A token as likely as the last one that stays also stays.
    """
    logits_bv = logits_bv.astype(jnp.float32)
    # subtract the maximum first, so that a small temperature cannot overflow
    logits_bv = (logits_bv - jnp.max(logits_bv, axis=-1, keepdims=True)) / config.temperature
    least = jnp.full_like(logits_bv[:, :1], -jnp.inf)  # the smallest logit that stays
    if config.top_k is not None:
        k = min(config.top_k, logits_bv.shape[-1])
        least = jax.lax.top_k(logits_bv, k)[0][:, -1:]
    if config.top_p is not None and config.top_p < 1:
        kept_bv = jnp.where(logits_bv >= least, logits_bv, -jnp.inf)
        ordered_bv = jnp.sort(kept_bv, axis=-1, descending=True)
        probabilities_bv = jax.nn.softmax(ordered_bv, axis=-1)
        likelier_bv = jnp.cumsum(probabilities_bv, axis=-1) - probabilities_bv
        needed_bv = (likelier_bv < config.top_p) & (ordered_bv > -jnp.inf)
        least = jnp.min(jnp.where(needed_bv, ordered_bv, jnp.inf), axis=-1, keepdims=True)
    if config.min_p is not None:
        least = jnp.maximum(least, math.log(config.min_p))
    return jnp.where(logits_bv >= least, logits_bv, -jnp.inf)


def sample(logits_bv: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """One token per row, int32 ``[b]``.

    A row's token depends on its logits, the key and its index, not on other rows.
    """
    if config.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_bv.shape[0]))
    draw = jax.vmap(jax.random.categorical)
    return draw(keys, filter_logits(logits_bv, config)).astype(jnp.int32)
