"""Attention on a mesh, and over a sequence that is sharded over devices (context parallelism).

Three ways to see keys of other devices, all of them exact:

- ``gather``: every device gathers all keys. Simple, and memory grows with the length.
- ``ring`` (Liu 2023, arXiv:2310.01889): keys and values go round the devices; each device attends
  to one part at a time, and parts are joined by their log-sum-exp,
  ``lse = log(e^lse₁ + e^lse₂)``, ``y = e^(lse₁−lse) y₁ + e^(lse₂−lse) y₂``. In the backward pass
  they go round again with their gradients; a device keeps nothing but its own share.
  ``zigzag`` is the same ring on a sequence dealt out in 2N pieces, of which device i has the i-th
  from either end, so that under a causal mask all have as much to do (`zigzag_order`).
- ``ulysses`` (Jacobs 2023, arXiv:2309.14509): an all-to-all exchanges the sharding of time for one
  of heads, and a second one exchanges it back. Requires as many key-value heads as devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.sharding import mesh_axis, per_device, spec
from layers.state import Keys
from pallas_kernels.derivatives import differentiable
from pallas_kernels.flash_attention import attention_gradients, flash_attention
from pallas_kernels.mask import Mask

CONTEXTS = ("gather", "ring", "zigzag", "ulysses")


def sharded_attention(
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    v_bskc: jax.Array,
    mask: Mask,
    *,
    alibi_slopes_h: jax.Array | np.ndarray | None = None,
    sinks_h: jax.Array | None = None,
    context: str = "gather",
    **options: Any,
) -> jax.Array:
    """`pallas_kernels.flash_attention` on whatever mesh is in force.

    Rows of the batch, heads and queries may be sharded; ``context`` says how queries meet keys
    where time is. ``options`` are `flash_attention`'s: ``scale, soft_cap, implementation``.
    """
    b, t, s = *q_bthc.shape[:2], k_bskc.shape[1]
    if spec() is not None:
        # each device has its own share of the queries and must know their positions
        mask = mask.whole(b, t, s)
    axis = mesh_axis("time")
    axis = None if context == "gather" else axis
    sharded = None if axis is None else "time"
    slopes_h = None if alibi_slopes_h is None else jnp.asarray(alibi_slopes_h)
    q_axes, k_axes = ("batch", "time", "heads", None), ("batch", sharded, "kv_heads", None)
    mask_axes = mask.sides(("batch", "time"), ("batch", sharded))

    def attend(q, k, v, mask, slopes, sinks):
        if axis is None:
            return flash_attention(q, k, v, mask, alibi_slopes_h=slopes, sinks_h=sinks, **options)
        keys = Keys(k, v, mask.k_positions_bs, mask.k_segments_bs)
        if context == "ulysses":
            return ulysses_attention(q, keys, mask, slopes, sinks, axis=axis, **options)
        contiguous = context == "ring"
        return ring_attention(
            q, keys, mask, slopes, sinks, axis=axis, contiguous=contiguous, **options
        )

    return per_device(
        attend,
        (q_bthc, k_bskc, v_bskc, mask, slopes_h, sinks_h),
        (q_axes, k_axes, k_axes, mask_axes, ("heads",), ("heads",)),
        q_axes,
    )


def zigzag_order(length: int, ways: int) -> np.ndarray:
    """Which token of the sequence stands at each place, for ``ways`` devices.

    ``length`` must be a multiple of ``2 · ways``.
    """
    pieces = np.arange(length).reshape(2 * ways, -1)
    return np.concatenate([pieces[[i, -1 - i]] for i in range(ways)]).reshape(-1)


def ring_attention(
    q_bthc: jax.Array,
    keys: Keys,
    mask: Mask,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
    *,
    axis: str | tuple[str, ...],
    contiguous: bool,
    **options: Any,
) -> jax.Array:
    """Attention of this device's queries over the keys of all devices along ``axis``.

    Runs on one device's share. ``keys`` and those of ``mask`` are this device's own.
    ``contiguous``: devices have consecutive pieces of the sequence, so that with a window and a
    causal mask only the nearest pieces have to come. ``options`` are `flash_attention`'s.
    """
    ways = jax.lax.axis_size(axis)
    rounds = ways
    if contiguous and mask.window is not None and mask.causal and mask.until_bt is None:
        # tokens of one segment are as far apart in the sequence as their positions say
        rounds = min(ways, 1 + -(-(mask.window - 1) // q_bthc.shape[1]))
    ring = _Ring(axis, ways, rounds, tuple(sorted(options.items())))
    return _op(ring)(q_bthc, keys, mask, slopes_h, sinks_h)


class _Ring(NamedTuple):
    """What is fixed before a ring is traced."""

    axis: str | tuple[str, ...]
    ways: int
    rounds: int
    options: tuple[tuple[str, Any], ...]

    def turn(self, tree, by: int = 1):
        """``tree`` from the device ``by`` places before."""
        pairs = [(i, (i + by) % self.ways) for i in range(self.ways)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axis, pairs), tree)


@functools.lru_cache(maxsize=256)
def _op(ring: _Ring):
    def reference(*arguments):
        return _forward(ring, *arguments)[0]

    return differentiable(
        functools.partial(_forward, ring), functools.partial(_backward, ring), reference
    )


def _forward(ring: _Ring, q, keys, mask, slopes, sinks):
    def attend(keys, sinks=None):
        return flash_attention(
            q,
            keys.k_bskc,
            keys.v_bskc,
            mask.with_keys(keys.positions_bs, keys.segments_bs),
            alibi_slopes_h=slopes,
            sinks_h=sinks,
            return_lse=True,
            **dict(ring.options),
        )

    y, lse_bht = attend(keys, sinks)
    y = y.astype(lse_bht.dtype)

    def step(carry, _):
        y, lse, keys = carry
        keys = ring.turn(keys)
        more, more_lse = attend(keys)
        both = jnp.logaddexp(lse, more_lse)
        y, more = (
            a * jnp.swapaxes(jnp.exp(part - both), 1, 2)[..., None]
            for a, part in ((y, lse), (more.astype(both.dtype), more_lse))
        )
        return (y + more, both, keys), None

    (y, lse_bht, _), _ = jax.lax.scan(step, (y, lse_bht, keys), length=ring.rounds - 1)
    y = y.astype(q.dtype)
    return y, (y, lse_bht)


def _backward(ring: _Ring, arguments, saved, dy):
    q, held, mask, slopes, sinks = arguments
    y, lse = saved
    exact = lse.dtype

    def gradients(keys):
        found = attention_gradients(
            q,
            keys.k_bskc,
            keys.v_bskc,
            y,
            lse,
            dy,
            mask.with_keys(keys.positions_bs, keys.segments_bs),
            alibi_slopes_h=slopes,
            **dict(ring.options),
        )
        return [a.astype(exact) for a in found]

    dq, dk, dv = gradients(held)

    def step(carry, _):
        dq, dk, dv, keys = carry
        # the gradients go round with what they are of
        keys, dk, dv = ring.turn((keys, dk, dv))
        more_q, more_k, more_v = gradients(keys)
        return (dq + more_q, dk + more_k, dv + more_v, keys), None

    (dq, dk, dv, _), _ = jax.lax.scan(step, (dq, dk, dv, held), length=ring.rounds - 1)
    # back to their own device, in the keys' dtype
    dk, dv = dk.astype(held.k_bskc.dtype), dv.astype(held.v_bskc.dtype)
    dk, dv = ring.turn((dk, dv), by=1 - ring.rounds)
    d_sinks = None
    if sinks is not None:
        # a sink is a key whose value is 0
        delta = jnp.einsum("bthc,bthc->bht", dy.astype(exact), y.astype(exact))
        weight = jnp.exp(sinks.astype(exact)[:, None] - lse)
        d_sinks = -jnp.sum(weight * delta, (0, 2)).astype(sinks.dtype)
    d_keys = Keys(dk, dv, None, None)  # type: ignore[arg-type]
    return dq.astype(q.dtype), d_keys, None, None, d_sinks


def ulysses_attention(
    q_bthc: jax.Array,
    keys: Keys,
    mask: Mask,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
    *,
    axis: str | tuple[str, ...],
    **options: Any,
) -> jax.Array:
    """`ring_attention`'s result by two all-to-alls: each device has all of time for some heads."""
    ways = jax.lax.axis_size(axis)

    def to_heads(a):
        return jax.lax.all_to_all(a, axis, split_axis=2, concat_axis=1, tiled=True)

    def all_time(a):
        return jax.lax.all_gather(a, axis, axis=1, tiled=True)

    def of_own_heads(a_h):
        if a_h is None:
            return None
        each = a_h.shape[0] // ways
        return jax.lax.dynamic_slice_in_dim(a_h, jax.lax.axis_index(axis) * each, each)

    mask = mask.with_keys(keys.positions_bs, keys.segments_bs)
    y: Any = flash_attention(
        to_heads(q_bthc),
        to_heads(keys.k_bskc),
        to_heads(keys.v_bskc),
        jax.tree.map(all_time, mask),
        alibi_slopes_h=of_own_heads(slopes_h),
        sinks_h=of_own_heads(sinks_h),
        **options,
    )
    return jax.lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)
