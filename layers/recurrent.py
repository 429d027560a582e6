"""Common parts of recurrent mixers: the preceding tokens, stored between calls, and padding.

Mamba's convolution sees three preceding tokens and RWKV's token shift one. `Tail` stores them
between calls; a token never sees one of another segment. In a call with a state, padding (position
−1) may be anywhere and changes no state. Without a state, it may be before or after the tokens of
a row: it is a separate segment.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from layers.config import ConfigError, check
from layers.sharding import reshard
from layers.state import LayerState
from pallas_kernels.mask import Mask

NO_SEGMENT = -1  # the segment of padding, and before the first token


class RecurrentState(LayerState):
    """A state that each token overwrites, so that it does not support `rewind`."""

    @property
    def can_rewind(self) -> bool:
        return False

    def rewind(self, count_b: jax.Array) -> Any:
        """Raise `ConfigError`: earlier states are overwritten. Callers may keep a copy."""
        raise ConfigError(
            f"state={type(self).__name__}: does not support rewind; keep a copy instead"
        )

    def cleared(self) -> Self:
        """The empty state: zeros, and no segment before the first token."""

        def empty(node):
            return node.cleared() if isinstance(node, Tail) else jnp.zeros_like(node)

        return jax.tree.map(empty, self, is_leaf=lambda node: isinstance(node, Tail))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail(RecurrentState):
    """The last ``n`` tokens' values and segments; zeros and `NO_SEGMENT` before the first."""

    values_bnd: jax.Array
    segments_bn: jax.Array  # int32

    @classmethod
    def empty(cls, batch: int, n: int, width: int, dtype, axis: str | None = None) -> "Tail":
        """The tail before the first token; ``axis`` is the logical name of ``width``."""
        segments = jnp.full((batch, n), NO_SEGMENT, jnp.int32)
        return cls(
            values_bnd=reshard(jnp.zeros((batch, n, width), dtype), "batch", None, axis),
            segments_bn=reshard(segments, "batch", None),
        )

    def cleared(self) -> "Tail":
        """The tail before the first token."""
        return Tail(jnp.zeros_like(self.values_bnd), jnp.full_like(self.segments_bn, NO_SEGMENT))


class Tokens(NamedTuple):
    """The tokens of one call, in the order of the recurrence: with a state, padding comes last.

    ``segments_bt``: None if all tokens are in one segment and none came before. ``valid_bt``: False
    for padding; None without a state. ``order_bt``: the index of each token in the call; None: the
    order is that of the call.
    """

    segments_bt: jax.Array | None
    valid_bt: jax.Array | None = None
    order_bt: jax.Array | None = None

    @classmethod
    def of(cls, x_btd: jax.Array, mask: Mask, tail: Tail | None) -> "tuple[Tokens, jax.Array]":
        """The tokens of a call, and ``x_btd`` in their order."""
        check(mask.until_bt is None, "until", "given", "recurrent layers do not support it")
        rows = x_btd.shape[:2]
        positions, segments = mask.q_positions_bt, mask.q_segments_bt
        if tail is None:
            if positions is not None:
                segments = jnp.zeros(rows, jnp.int32) if segments is None else segments
                segments = jnp.where(positions >= 0, segments, NO_SEGMENT)
            if segments is not None:
                # each device requires the segments of all tokens in its rows
                segments = reshard(jnp.broadcast_to(segments, rows), "batch", None)
            return cls(segments), x_btd
        assert positions is not None
        segments = jnp.zeros(rows, jnp.int32) if segments is None else segments
        segments, positions = (jnp.broadcast_to(a, rows) for a in (segments, positions))
        valid, order = positions >= 0, None
        if rows[1] > 1:
            order = jnp.argsort(~valid, axis=1, stable=True)
            x_btd = jnp.take_along_axis(x_btd, order[..., None], axis=1)
            segments, valid = (jnp.take_along_axis(a, order, axis=1) for a in (segments, valid))
        # padding has the segment of the last token: a new segment would reset the state
        extended = jnp.concatenate((tail.segments_bn[:, -1:], segments), axis=1)
        last_segment = jnp.take_along_axis(extended, jnp.sum(valid, axis=1, keepdims=True), axis=1)
        return cls(jnp.where(valid, segments, last_segment), valid, order), x_btd

    def as_called(self, y: jax.Array) -> jax.Array:
        """``y``, ``[b, t, …]``, in the order of the call."""
        if self.order_bt is None:
            return y
        inverse = jnp.argsort(self.order_bt, axis=1)
        return jnp.take_along_axis(y, inverse.reshape(*inverse.shape, *[1] * (y.ndim - 2)), axis=1)

    def continues(self, tail: Tail) -> jax.Array:
        """``[b]``: whether the first token has the segment of the last one in ``tail``."""
        assert self.segments_bt is not None
        return self.segments_bt[:, 0] == tail.segments_bn[:, -1]


def before(
    x_btd: jax.Array, n: int, tokens: Tokens, tail: Tail | None, axis: str | None = None
) -> list[jax.Array]:
    """``[x_{t−n}, …, x_{t−1}]``, each ``[b, t, d]``; 0 where that token has another segment.

    ``axis`` is the logical name of ``d``.
    """
    b, t, d = x_btd.shape
    tail_or_empty = Tail.empty(b, n, d, x_btd.dtype) if tail is None else tail
    values_bnd = reshard(tail_or_empty.values_bnd.astype(x_btd.dtype), "batch", None, axis)
    extended = jnp.concatenate((values_bnd, x_btd), axis=1)
    delayed = [extended[:, i : i + t] for i in range(n)]
    if tokens.segments_bt is None:
        return delayed
    tail_bn = reshard(tail_or_empty.segments_bn, "batch", None)
    segments = jnp.concatenate((tail_bn, tokens.segments_bt), axis=1)
    same = [segments[:, i : i + t] == tokens.segments_bt for i in range(n)]
    return [
        jnp.where(is_same[..., None], values, 0)
        for is_same, values in zip(same, delayed, strict=True)
    ]


def after(x_btd: jax.Array, tokens: Tokens, tail: Tail, axis: str | None = None) -> Tail:
    """The tail after the tokens of this call; ``tail`` is the one before.

    ``axis`` is the logical name of ``d``.
    """
    assert tokens.valid_bt is not None and tokens.segments_bt is not None
    n = tail.values_bnd.shape[1]
    count_b = jnp.sum(tokens.valid_bt, axis=1)
    index_bn = count_b[:, None] + jnp.arange(n)  # into tail and call, concatenated

    def last(old, new):
        extended = jnp.concatenate((old, new.astype(old.dtype)), axis=1)
        return jnp.take_along_axis(
            extended, index_bn.reshape(*index_bn.shape, *[1] * (new.ndim - 2)), 1
        )

    x_btd = reshard(x_btd, "batch", None, axis)
    segments_bt = reshard(tokens.segments_bt, "batch", None)
    return Tail(last(tail.values_bnd, x_btd), last(tail.segments_bn, segments_bt))


def carried(state: jax.Array, continues_b: jax.Array, empty: float = 0.0) -> jax.Array:
    """``state`` in rows whose segment continues, ``empty`` in the others."""
    return jnp.where(continues_b.reshape(-1, *[1] * (state.ndim - 1)), state, empty)
