"""What recurrent mixers share: the tokens just before, kept from call to call, and padding.

Mamba's convolution looks three tokens back and RWKV's token shift one. `Tail` holds those tokens
between calls; a token never sees one of another segment. Padding (position −1) changes no state,
wherever it stands in a call that has one. Without a state it may stand before or after a row's
tokens: it is a segment of its own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.config import ConfigError, check
from layers.sharding import reshard
from pallas_kernels.mask import Mask

NO_SEGMENT = -1  # of padding, and of what stands before the first token


class RecurrentState:
    """A state that a later token overwrites."""

    def rewind(self, count_b: jax.Array) -> Any:
        """Raises `ConfigError`: the tokens before are gone. Keep an earlier state instead."""
        raise ConfigError(
            f"state={type(self).__name__}: a recurrent state cannot be rewound; keep a copy of it"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail(RecurrentState):
    """The last ``n`` tokens' values and segments; zeros and `NO_SEGMENT` before the first."""

    values_bnd: jax.Array
    segments_bn: jax.Array  # int32

    @classmethod
    def empty(cls, batch: int, n: int, width: int, dtype) -> "Tail":
        return cls(
            values_bnd=jnp.zeros((batch, n, width), dtype),
            segments_bn=jnp.full((batch, n), NO_SEGMENT, jnp.int32),
        )


class Tokens(NamedTuple):
    """One call's tokens as a recurrence sees them: with a state, a row's padding after its tokens.

    ``segments_bt`` is None where all are of one segment and nothing came before. ``valid_bt`` is
    None where no token needs to be skipped (a call without state). ``order_bt`` is where each token
    stood in the call; None: where it stands.
    """

    segments_bt: jax.Array | None
    valid_bt: jax.Array | None = None
    order_bt: jax.Array | None = None

    @classmethod
    def of(cls, x_btd: jax.Array, mask: Mask, tail: Tail | None) -> "tuple[Tokens, jax.Array]":
        """The tokens of a call, and ``x_btd`` in their order."""
        check(mask.until_bt is None, "until", "given", "a recurrent layer sees no later token")
        rows = x_btd.shape[:2]
        positions, segments = mask.q_positions_bt, mask.q_segments_bt
        if tail is None:
            if positions is not None:
                segments = jnp.zeros(rows, jnp.int32) if segments is None else segments
                segments = jnp.where(positions >= 0, segments, NO_SEGMENT)
            if segments is not None:
                # every device needs to know where segments begin
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
        # padding goes on in the segment before it, or it would begin one of its own
        known = jnp.concatenate((tail.segments_bn[:, -1:], segments), axis=1)
        last = jnp.take_along_axis(known, jnp.sum(valid, axis=1, keepdims=True), axis=1)
        return cls(jnp.where(valid, segments, last), valid, order), x_btd

    def as_called(self, y: jax.Array) -> jax.Array:
        """``y``, ``[b, t, …]``, in the order of the call."""
        if self.order_bt is None:
            return y
        back = jnp.argsort(self.order_bt, axis=1)
        return jnp.take_along_axis(y, back.reshape(*back.shape, *[1] * (y.ndim - 2)), axis=1)

    def continues(self, tail: Tail) -> jax.Array:
        """``[b]``: whether the first token is of the segment of the last one in ``tail``."""
        assert self.segments_bt is not None
        return self.segments_bt[:, 0] == tail.segments_bn[:, -1]


def before(
    x_btd: jax.Array, n: int, tokens: Tokens, tail: Tail | None, axis: str | None = None
) -> list[jax.Array]:
    """``[x_{t−n}, …, x_{t−1}]``, each ``[b, t, d]``; 0 where that is of another segment.

    ``axis`` is the logical name of ``d``.
    """
    b, t, d = x_btd.shape
    held = Tail.empty(b, n, d, x_btd.dtype) if tail is None else tail
    values_bnd = reshard(held.values_bnd.astype(x_btd.dtype), "batch", None, axis)
    whole = jnp.concatenate((values_bnd, x_btd), axis=1)
    parts = [whole[:, i : i + t] for i in range(n)]
    if tokens.segments_bt is None:
        return parts
    held_bn = reshard(held.segments_bn, "batch", None)
    segments = jnp.concatenate((held_bn, tokens.segments_bt), axis=1)
    same = [segments[:, i : i + t] == tokens.segments_bt for i in range(n)]
    return [jnp.where(seen[..., None], part, 0) for seen, part in zip(same, parts, strict=True)]


def after(x_btd: jax.Array, tokens: Tokens, tail: Tail) -> Tail:
    """``tail`` moved past this call's tokens."""
    assert tokens.valid_bt is not None and tokens.segments_bt is not None
    n = tail.values_bnd.shape[1]
    count_b = jnp.sum(tokens.valid_bt, axis=1)
    kept_bn = count_b[:, None] + jnp.arange(n)  # of the tail and the call together

    def last(old, new):
        whole = jnp.concatenate((old, new.astype(old.dtype)), axis=1)
        return jnp.take_along_axis(whole, kept_bn.reshape(*kept_bn.shape, *[1] * (new.ndim - 2)), 1)

    return Tail(last(tail.values_bnd, x_btd), last(tail.segments_bn, tokens.segments_bt))


def carried(state: jax.Array, continues_b: jax.Array, empty: float = 0.0) -> jax.Array:
    """``state`` of the rows whose segment goes on, ``empty`` elsewhere."""
    return jnp.where(continues_b.reshape(-1, *[1] * (state.ndim - 1)), state, empty)
