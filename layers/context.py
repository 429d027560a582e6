"""Attention over a sequence that is split over devices (context parallelism).

Three ways to see keys that lie elsewhere, all of them exact:

- ``gather``: every device gathers all keys. Simple, and memory grows with the length.
- ``ring`` (Liu 2023, arXiv:2310.01889): keys and values go round the devices; each meets a part,
  and parts are joined by their log-sum-exp,
  ``lse = log(e^lse₁ + e^lse₂)``, ``y = e^(lse₁−lse) y₁ + e^(lse₂−lse) y₂``. In the backward pass
  they go round again with their gradients; nothing but a device's own share is kept.
  ``zigzag`` is the same ring on a sequence dealt out in 2N pieces, of which device i has the i-th
  from either end, so that under a causal mask all have as much to do (`zigzag_order`).
- ``ulysses`` (Jacobs 2023, arXiv:2309.14509): an all-to-all exchanges the split of time for one of
  heads, and a second one exchanges it back. Needs as many key-value heads as devices.

These functions run inside an `island` on one device's share.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import attention_gradients, flash_attention

CONTEXTS = ("gather", "ring", "zigzag", "ulysses")


class Keys(NamedTuple):
    """What goes round: keys with their values, positions and segments (None if there are none)."""

    k_bskc: jax.Array
    v_bskc: jax.Array
    positions_bs: jax.Array
    segments_bs: jax.Array | None


def zigzag_order(length: int, ways: int) -> np.ndarray:
    """Which token of the sequence stands at each place, for ``ways`` devices.

    ``length`` must be a multiple of ``2 · ways``.
    """
    pieces = np.arange(length).reshape(2 * ways, -1)
    return np.concatenate([pieces[[i, -1 - i]] for i in range(ways)]).reshape(-1)


def ring_attention(
    q_bthc: jax.Array,
    keys: Keys,
    q_positions_bt: jax.Array,
    q_segments_bt: jax.Array | None,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
    *,
    axis: str,
    contiguous: bool,
    **options: Any,
) -> jax.Array:
    """Attention of this device's queries over the keys of all devices along ``axis``.

    ``contiguous``: devices have consecutive pieces of the sequence, so that with a window and a
    causal mask only the nearest pieces have to come. ``options`` are `flash_attention`'s.
    """
    ways = jax.lax.axis_size(axis)
    window = options["window"]
    rounds = ways
    if contiguous and window is not None and options["causal"]:
        # tokens of one segment are as far apart in the sequence as their positions say
        rounds = min(ways, 1 + -(-(window - 1) // q_bthc.shape[1]))
    ring = _Ring(axis, ways, rounds, tuple(sorted(options.items())))
    return _ring(ring, q_bthc, keys, q_positions_bt, q_segments_bt, slopes_h, sinks_h)


class _Ring(NamedTuple):
    """What is fixed before a ring is traced."""

    axis: str
    ways: int
    rounds: int
    options: tuple[tuple[str, Any], ...]

    def turn(self, tree, by: int = 1):
        """``tree`` from the device ``by`` places before."""
        pairs = [(i, (i + by) % self.ways) for i in range(self.ways)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axis, pairs), tree)

    def places(self, keys: Keys, q_positions, q_segments, slopes) -> dict[str, Any]:
        """Options of the kernel for queries that meet ``keys``."""
        return dict(
            self.options,
            q_positions_bt=q_positions,
            k_positions_bs=keys.positions_bs,
            q_segments_bt=q_segments,
            k_segments_bs=keys.segments_bs,
            alibi_slopes_h=slopes,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring, q, keys, q_positions, q_segments, slopes, sinks):
    return _forward(ring, q, keys, q_positions, q_segments, slopes, sinks)[0]


def _forward(ring: _Ring, q, keys, q_positions, q_segments, slopes, sinks):
    def meet(keys, sinks=None):
        places = ring.places(keys, q_positions, q_segments, slopes)
        return flash_attention(
            q, keys.k_bskc, keys.v_bskc, **places, sinks_h=sinks, return_lse=True
        )

    y, lse_bht = meet(keys, sinks)
    y = y.astype(lse_bht.dtype)

    def step(carry, _):
        y, lse, keys = carry
        keys = ring.turn(keys)
        own, own_lse = meet(keys)
        both = jnp.logaddexp(lse, own_lse)
        y, own = (
            a * jnp.swapaxes(jnp.exp(part - both), 1, 2)[..., None]
            for a, part in ((y, lse), (own.astype(both.dtype), own_lse))
        )
        return (y + own, both, keys), None

    (y, lse_bht, _), _ = jax.lax.scan(step, (y, lse_bht, keys), length=ring.rounds - 1)
    y = y.astype(q.dtype)
    return y, (q, keys, q_positions, q_segments, slopes, sinks, y, lse_bht)


def _backward(ring: _Ring, residuals, dy):
    q, own, q_positions, q_segments, slopes, sinks, y, lse = residuals
    exact = lse.dtype

    def meet(keys):
        places = ring.places(keys, q_positions, q_segments, slopes)
        found = attention_gradients(q, keys.k_bskc, keys.v_bskc, y, lse, dy, **places)
        return [a.astype(exact) for a in found]

    dq, dk, dv = meet(own)

    def step(carry, _):
        dq, dk, dv, keys = carry
        # the gradients go round with what they are of
        keys, dk, dv = ring.turn((keys, dk, dv))
        more_q, more_k, more_v = meet(keys)
        return (dq + more_q, dk + more_k, dv + more_v, keys), None

    (dq, dk, dv, _), _ = jax.lax.scan(step, (dq, dk, dv, own), length=ring.rounds - 1)
    # home, as narrow as they are to be
    dk, dv = dk.astype(own.k_bskc.dtype), dv.astype(own.v_bskc.dtype)
    dk, dv = ring.turn((dk, dv), by=1 - ring.rounds)
    d_sinks = None
    if sinks is not None:
        # a sink is a key whose value is 0
        delta = jnp.einsum("bthc,bthc->bht", dy.astype(exact), y.astype(exact))
        weight = jnp.exp(sinks.astype(exact)[:, None] - lse)
        d_sinks = -jnp.sum(weight * delta, (0, 2)).astype(sinks.dtype)
    d_keys = Keys(dk, dv, None, None)  # type: ignore[arg-type]
    return dq.astype(q.dtype), d_keys, None, None, None, d_sinks


_ring.defvjp(_forward, _backward)


def ulysses_attention(
    q_bthc: jax.Array,
    keys: Keys,
    q_positions_bt: jax.Array,
    q_segments_bt: jax.Array | None,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
    *,
    axis: str,
    **options: Any,
) -> jax.Array:
    """`ring_attention`'s result by two all-to-alls: each device has all of time for some heads."""
    ways = jax.lax.axis_size(axis)

    def to_heads(a):
        return jax.lax.all_to_all(a, axis, split_axis=2, concat_axis=1, tiled=True)

    def whole(a):
        return None if a is None else jax.lax.all_gather(a, axis, axis=1, tiled=True)

    def mine(a_h):
        """The heads of this device."""
        if a_h is None:
            return None
        each = a_h.shape[0] // ways
        return jax.lax.dynamic_slice_in_dim(a_h, jax.lax.axis_index(axis) * each, each)

    y = flash_attention(
        *(to_heads(a) for a in (q_bthc, keys.k_bskc, keys.v_bskc)),
        q_positions_bt=whole(q_positions_bt),
        k_positions_bs=whole(keys.positions_bs),
        q_segments_bt=whole(q_segments_bt),
        k_segments_bs=whole(keys.segments_bs),
        alibi_slopes_h=mine(slopes_h),
        sinks_h=mine(sinks_h),
        **options,
    )
    return jax.lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)
