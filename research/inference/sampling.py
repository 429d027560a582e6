"""Chooses the next token of each row, by the row's own settings.

In this order, as in transformers and vLLM:

1. ``logit_bias`` is added;
2. the repetition penalty (Keskar 2019), then the presence and frequency penalties (OpenAI);
3. tokens that are not allowed are excluded;
4. the temperature divides;
5. top-k, top-p (Holtzman 2019), min-p (Nguyen 2024) exclude, each what the one before left;
6. a draw; with a temperature of 0 the likeliest token after step 3.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import check, check_types

MOST_LOGPROBS = 20
_LEAST = float(np.finfo(np.float32).tiny)  # above 0
_HOTTEST = 1e30  # its reciprocal is a float32: above it no temperature changes a probability


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one row are chosen, and when it stops.

    ``max_new_tokens``: the most new tokens. ``temperature`` divides the logits; 0 selects the
    likeliest token, with any filters. ``top_k``, ``top_p``, ``min_p``: see `filter_logits`; None:
    not used. ``stop_tokens``: ids that end the row. ``seed``: the same seed gives the same tokens.

    ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``, ``logit_bias`` as pairs
    (token, bias): see `penalise`. ``logprobs``: how many of the likeliest tokens are reported
    with each token; None: none.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self):
        check_types(self)
        check(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "must be ≥ 0")
        check(self.temperature >= 0, "temperature", self.temperature, "must be ≥ 0")
        check(self.top_k is None or self.top_k > 0, "top_k", self.top_k, "must be > 0 or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            check(value is None or 0 < value <= 1, name, value, "must be in (0, 1] or None")
        for i, token in enumerate(self.stop_tokens):
            check(token >= 0, f"stop_tokens[{i}]", token, "must be ≥ 0")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        penalty = self.repetition_penalty
        check(0.01 <= penalty <= 100, "repetition_penalty", penalty, "must be in [0.01, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(-2 <= value <= 2, name, value, "must be in [-2, 2]")
        seen: set[int] = set()
        for i, (token, bias) in enumerate(self.logit_bias):
            check(token >= 0, f"logit_bias[{i}][0]", token, "must be ≥ 0")
            check(token not in seen, f"logit_bias[{i}][0]", token, "must be given once")
            check(-100 <= bias <= 100, f"logit_bias[{i}][1]", bias, "must be in [-100, 100]")
            seen.add(token)
        allowed = self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS
        check(allowed, "logprobs", self.logprobs, f"must be in [0, {MOST_LOGPROBS}] or None")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `ConfigError` if a token that this names is not below ``vocab_size``."""
        requirement = f"must be below vocab_size={vocab_size}"
        for i, token in enumerate(self.stop_tokens):
            check(token < vocab_size, f"stop_tokens[{i}]", token, requirement)
        for i, (token, _) in enumerate(self.logit_bias):
            check(token < vocab_size, f"logit_bias[{i}][0]", token, requirement)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The `SamplingConfig` of each row as arrays, and the tokens that its penalties count.

    ``index_b``: tells apart rows of one seed, such as several answers to one prompt. ``counts_bv``:
    how often a row has generated each token. ``prompt_bv``: the tokens in its prompt.
    ``adjusts_b`` and ``filters_b``: the rows that `penalise` and the filters change. If there are
    none, these are not computed; they are the identity for the other rows.
    """

    temperature_b: jax.Array  # float32
    top_k_b: jax.Array  # int32
    top_p_b: jax.Array  # float32, as all below if nothing else is said
    min_p_b: jax.Array
    repetition_b: jax.Array
    presence_b: jax.Array
    frequency_b: jax.Array
    seed_b: jax.Array  # uint32
    index_b: jax.Array  # int32
    wants_logprobs_b: jax.Array  # bool
    adjusts_b: jax.Array  # bool
    filters_b: jax.Array  # bool
    counts_bv: jax.Array  # int32
    prompt_bv: jax.Array  # bool
    bias_bv: jax.Array

    @classmethod
    def of(
        cls, config: SamplingConfig, vocab_size: int, prompt: Sequence[int] = (), index: int = 0
    ) -> "SamplingRows":
        """One row, as NumPy arrays.

        Raises:
          ConfigError: ``config`` names a token outside the vocabulary.
        """
        config.check_vocabulary(vocab_size)
        temperature = min(config.temperature, _HOTTEST) if config.temperature >= _LEAST else 0.0
        prompt_v, bias_v = np.zeros(vocab_size, bool), np.zeros(vocab_size, np.float32)
        prompt_v[np.asarray(prompt, np.int64)] = True
        for token, bias in config.logit_bias:
            bias_v[token] = bias
        penalties = config.repetition_penalty, config.presence_penalty, config.frequency_penalty
        row: dict[str, Any] = dict(
            temperature_b=np.float32(temperature),
            top_k_b=np.int32(min(config.top_k or vocab_size, vocab_size)),
            top_p_b=np.float32(max(config.top_p or 1, _LEAST)),
            min_p_b=np.float32(config.min_p or 0),
            repetition_b=np.float32(config.repetition_penalty),
            presence_b=np.float32(config.presence_penalty),
            frequency_b=np.float32(config.frequency_penalty),
            seed_b=np.uint32(config.seed),
            index_b=np.int32(index),
            wants_logprobs_b=np.bool_(bool(config.logprobs)),
            adjusts_b=np.bool_(penalties != (1, 0, 0) or bool(bias_v.any())),
            filters_b=np.bool_(temperature > 0 and any((config.top_k, config.top_p, config.min_p))),
            counts_bv=np.zeros(vocab_size, np.int32),
            prompt_bv=prompt_v,
            bias_bv=bias_v,
        )
        return cls(**{name: value[None] for name, value in row.items()})

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> "SamplingRows":
        """Greedy rows, which cost least."""
        row = cls.of(SamplingConfig(temperature=0), vocab_size)
        return jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), row)

    def set_row(self, row: jax.Array | int, one: "SamplingRows") -> "SamplingRows":
        """Row ``row``, which may be traced, becomes that of ``one``, which has one row."""
        return jax.tree.map(lambda a, b: jnp.asarray(a).at[row].set(b[0]), self, one)

    def counted(self, tokens: jax.Array, valid: jax.Array) -> "SamplingRows":
        """After ``tokens``, ``[b]`` or ``[b, t]``, were generated where ``valid``."""
        row = jnp.arange(tokens.shape[0]).reshape(-1, *[1] * (tokens.ndim - 1))
        counts_bv = jnp.asarray(self.counts_bv).at[row, tokens].add(valid.astype(jnp.int32))
        return dataclasses.replace(self, counts_bv=counts_bv)

    def keys(self, position_b: jax.Array) -> jax.Array:
        """The key of each row's token at ``position_b``, from the seed, the index and it."""

        def key(seed, index, position):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)

        return jax.vmap(key)(self.seed_b, self.index_b, position_b)


class Sampled(NamedTuple):
    """A token of each row, int32 ``[b]``, and what the model says of it.

    ``logprob_b``: its log-probability, float32. ``top_ids_b20``, ``top_logprobs_b20``: the
    likeliest tokens and their log-probabilities, in rows that want them; elsewhere, and beyond the
    vocabulary, −1 and −inf. All are of the model's distribution: no bias, penalty, temperature or
    filter changes them.
    """

    token_b: jax.Array
    logprob_b: jax.Array
    top_ids_b20: jax.Array
    top_logprobs_b20: jax.Array


def penalise(logits_bv: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits with bias and penalties, float32 ``[b, v]``.

    With ``c`` the number of times that a row has generated a token, its logit l becomes

    1. l + bias;
    2. l / repetition if l > 0, else l · repetition: for tokens of the prompt or with c > 0;
    3. l − c · frequency − presence: the latter if c > 0.
    """

    def adjusted(logits_bv):
        l_bv, counts_bv = logits_bv + rows.bias_bv, rows.counts_bv
        repetition = rows.repetition_b[:, None]
        repeated_bv = jnp.where(l_bv > 0, l_bv / repetition, l_bv * repetition)
        l_bv = jnp.where(rows.prompt_bv | (counts_bv > 0), repeated_bv, l_bv)
        l_bv -= counts_bv * rows.frequency_b[:, None]
        return l_bv - (counts_bv > 0) * rows.presence_b[:, None]

    logits_bv = logits_bv.astype(jnp.float32)
    return jax.lax.cond(jnp.any(rows.adjusts_b), adjusted, lambda x: x, logits_bv)


def filter_logits(logits_bv: jax.Array, rows: SamplingRows) -> jax.Array:
    """(logits − their maximum) / temperature; −inf where a filter excludes the token.

    In this order, each filter on what the previous one left, as in transformers; float32
    ``[b, v]``:

    1. temperature; 1 in rows whose temperature is 0;
    2. ``top_k``: the k likeliest;
    3. ``top_p``: the fewest likeliest tokens whose probabilities reach ``top_p`` together;
    4. ``min_p``: tokens at least ``min_p`` times as likely as the likeliest.

    The likeliest token always stays. A token as likely as the last one that stays also stays.
    """
    logits_bv = logits_bv.astype(jnp.float32)
    temperature_b = jnp.where(rows.temperature_b > 0, rows.temperature_b, 1)
    # subtract the maximum first, so that a small temperature cannot overflow
    logits_bv -= jnp.max(logits_bv, axis=-1, keepdims=True)
    logits_bv /= temperature_b[:, None]

    def filtered(logits_bv):
        return jnp.where(-logits_bv <= _farthest(-logits_bv, rows), logits_bv, -jnp.inf)

    return jax.lax.cond(jnp.any(rows.filters_b), filtered, lambda x: x, logits_bv)


def _farthest(distance_bv: jax.Array, rows: SamplingRows) -> jax.Array:
    """The largest distance from the likeliest token's logit that stays in each row, ``[b, 1]``."""
    k_b1, p_b1 = rows.top_k_b[:, None], rows.top_p_b[:, None]

    def k_likeliest():
        def enough(limit_b1):
            return jnp.sum(distance_bv <= limit_b1, axis=-1, keepdims=True) >= k_b1

        return _smallest(enough, b)

    def nucleus():
        weights_bv = jnp.where(distance_bv <= farthest_b1, jnp.exp(-distance_bv), 0)
        total_b1 = jnp.sum(weights_bv, axis=-1, keepdims=True)

        def enough(limit_b1):
            within_bv = jnp.where(distance_bv <= limit_b1, weights_bv, 0)
            return jnp.sum(within_bv, axis=-1, keepdims=True) >= p_b1 * total_b1

        return jnp.where(p_b1 < 1, _smallest(enough, b), farthest_b1)

    b, v = distance_bv.shape
    all_b1 = jnp.full((b, 1), jnp.inf)
    farthest_b1 = jax.lax.cond(jnp.any(k_b1 < v), k_likeliest, lambda: all_b1)
    farthest_b1 = jax.lax.cond(jnp.any(p_b1 < 1), nucleus, lambda: farthest_b1)
    return jnp.minimum(farthest_b1, -jnp.log(rows.min_p_b)[:, None])


def _smallest(holds: Callable[[jax.Array], jax.Array], b: int) -> jax.Array:
    """The smallest float32 x ≥ 0 of each row for which ``holds(x)``, or ∞; ``[b, 1]``.

    ``holds`` must also hold above x. Bisects the bits of a float, whose order is that of the
    floats: 31 sums over a vocabulary, which take less time than a sort.
    """

    def halve(_, bounds):
        low_b1, high_b1 = bounds  # holds at high, or that is ∞; not at low
        middle_b1 = low_b1 + (high_b1 - low_b1) // 2
        holds_b1 = holds(jax.lax.bitcast_convert_type(middle_b1, jnp.float32))
        return jnp.where(holds_b1, low_b1, middle_b1), jnp.where(holds_b1, middle_b1, high_b1)

    infinity = np.float32(np.inf).view(np.int32)
    bounds = jnp.full((b, 1), -1, jnp.int32), jnp.full((b, 1), infinity, jnp.int32)
    _, bits_b1 = jax.lax.fori_loop(0, 31, halve, bounds)
    return jax.lax.bitcast_convert_type(bits_b1, jnp.float32)


def sample(
    logits_bv: jax.Array,
    position_b: jax.Array,
    rows: SamplingRows,
    allowed_bv: jax.Array | None = None,
) -> Sampled:
    """One token for each row, by the settings in ``rows``.

    A row's token depends on its logits, settings and counts, and on its seed, its index and the
    position of the token: not on other rows, bit for bit.

    Args:
      position_b: the position of the token that is chosen.
      allowed_bv: bool; the tokens that may be chosen, at least one in each row; None: all.
    """
    logits_bv = logits_bv.astype(jnp.float32)
    scores_bv = _scores(logits_bv, rows, allowed_bv)
    likeliest_b = jnp.argmax(scores_bv, axis=-1)

    def drawn(scores_bv):
        draw = jax.vmap(jax.random.categorical)
        drawn_b = draw(rows.keys(position_b), filter_logits(scores_bv, rows))
        return jnp.where(rows.temperature_b > 0, drawn_b, likeliest_b)

    any_drawn = jnp.any(rows.temperature_b > 0)
    token_b = jax.lax.cond(any_drawn, drawn, lambda _: likeliest_b, scores_bv).astype(jnp.int32)
    return Sampled(token_b, *logprobs_of(logits_bv, token_b, rows))


def logprobs_of(
    logits: jax.Array, tokens: jax.Array, rows: SamplingRows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `Sampled` says of ``tokens``: log-probabilities, likeliest tokens, theirs.

    ``logits``: ``[b, v]`` with ``[b]`` tokens, or ``[b, t, v]`` with ``[b, t]``.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_tokens = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return of_tokens, *_top_if_wanted(logprobs, rows.wants_logprobs_b)


def probabilities(
    logits_bv: jax.Array, rows: SamplingRows, allowed_bv: jax.Array | None = None
) -> jax.Array:
    """The law of the tokens of `sample`, float32 ``[b, v]``; with temperature 0 it is one-hot."""
    scores_bv = _scores(logits_bv.astype(jnp.float32), rows, allowed_bv)
    likeliest_bv = jax.nn.one_hot(jnp.argmax(scores_bv, axis=-1), scores_bv.shape[-1])

    def drawn(scores_bv):
        law_bv = jax.nn.softmax(filter_logits(scores_bv, rows), axis=-1)
        return jnp.where(rows.temperature_b[:, None] > 0, law_bv, likeliest_bv)

    any_drawn = jnp.any(rows.temperature_b > 0)
    return jax.lax.cond(any_drawn, drawn, lambda _: likeliest_bv, scores_bv)


def _scores(logits_bv: jax.Array, rows: SamplingRows, allowed_bv: jax.Array | None) -> jax.Array:
    """Logits with bias and penalties; −inf for tokens that are not allowed."""
    scores_bv = penalise(logits_bv, rows)
    return scores_bv if allowed_bv is None else jnp.where(allowed_bv, scores_bv, -jnp.inf)


def top_logprobs(logprobs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `MOST_LOGPROBS` likeliest tokens of each row, and theirs; −1, −inf beyond ``v``."""
    values, ids = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logprobs.shape[-1]))
    missing = *((0, 0),) * (ids.ndim - 1), (0, MOST_LOGPROBS - ids.shape[-1])
    return (
        jnp.pad(ids, missing, constant_values=-1),
        jnp.pad(values, missing, constant_values=-jnp.inf),
    )


def _top_if_wanted(logprobs: jax.Array, wanted_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (*logprobs.shape[:-1], MOST_LOGPROBS)
    none = jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)
    ids, values = jax.lax.cond(jnp.any(wanted_b), top_logprobs, lambda _: none, logprobs)
    wanted = wanted_b.reshape(-1, *[1] * (ids.ndim - 1))
    return jnp.where(wanted, ids, -1), jnp.where(wanted, values, -jnp.inf)
