"""What recurrent mixers share: the tokens just before, kept from call to call.

Mamba's convolution looks three tokens back and RWKV's token shift one. `Tail` holds those tokens
between calls; a token never sees one of another segment.

Padding (position −1) must follow a row's tokens within a call, as `research.inference` lays it out:
it changes no state.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.sharding import place

NO_SEGMENT = -1  # of what stands before the first token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
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
    """One call's tokens as a recurrence sees them.

    ``segments_bt`` is None where all are of one segment and nothing came before. ``valid_bt`` is
    None where no token is padding (a call without state).
    """

    segments_bt: jax.Array | None
    valid_bt: jax.Array | None

    @classmethod
    def of(cls, x_btd, positions_bt, segment_ids_bt, tail: Tail | None) -> "Tokens":
        """``positions_bt`` and ``segment_ids_bt`` are one row or one a row of ``x_btd``."""
        rows = x_btd.shape[:2]
        if segment_ids_bt is not None:
            # every device needs to know where segments begin
            segment_ids_bt = place(segment_ids_bt, "batch", None)
        if tail is None:
            return cls(segment_ids_bt, None)
        if segment_ids_bt is None:
            segment_ids_bt = jnp.zeros(rows, jnp.int32)
        segments_bt = jnp.broadcast_to(segment_ids_bt, rows)
        valid_bt = jnp.broadcast_to(positions_bt >= 0, rows)
        # padding goes on in the segment before it, or it would begin one of its own
        known = jnp.concatenate((tail.segments_bn[:, -1:], segments_bt), axis=1)
        last_b1 = jnp.take_along_axis(known, jnp.sum(valid_bt, axis=1, keepdims=True), axis=1)
        return cls(jnp.where(valid_bt, segments_bt, last_b1), valid_bt)

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
    values_bnd = place(held.values_bnd.astype(x_btd.dtype), "batch", None, axis)
    whole = jnp.concatenate((values_bnd, x_btd), axis=1)
    parts = [whole[:, i : i + t] for i in range(n)]
    if tokens.segments_bt is None:
        return parts
    held_bn = place(held.segments_bn, "batch", None)
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
