"""Attention on a mesh, also with a sequence that is sharded over devices (context parallelism).

Three algorithms, all exact:

- ``gather``: keys and values are all-gathered. Simple, but memory grows with the length.
- ``ring`` (Liu 2023, arXiv:2310.01889): keys and values are passed around a ring of devices. Each
  device attends to one shard of them at a time, and results are joined by their log-sum-exp,
  ``lse = log(e^lse₁ + e^lse₂)``, ``y = e^(lse₁−lse) y₁ + e^(lse₂−lse) y₂``. In the backward pass
  keys and values are passed around again, with their gradients; a device stores only its shard.
  ``zigzag`` is the same ring with the sequence in 2N pieces: device i has the i-th piece from the
  start and the i-th from the end, so that a causal mask gives equal work to all (`zigzag_order`).
- ``ulysses`` (Jacobs 2023, arXiv:2309.14509): an all-to-all reshards from time to heads, and a
  second one back. The number of devices must divide the number of key-value heads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.cache import Keys
from layers.sharding import mesh_axis, per_device, spec
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
    """`pallas_kernels.flash_attention` on the current mesh.

    Batch, heads and time may be sharded; ``context`` is the algorithm where time is sharded.
    ``options`` are those of `flash_attention`: ``scale, soft_cap, implementation``.
    """
    b, t, s = *q_bthc.shape[:2], k_bskc.shape[1]
    if spec() is not None:
        # each device has a shard of the queries and requires their positions
        mask = mask.whole(b, t, s)
    axis = mesh_axis("time")
    axis = None if context == "gather" else axis
    key_time = None if axis is None else "time"
    slopes_h = None if alibi_slopes_h is None else jnp.asarray(alibi_slopes_h)
    q_axes, k_axes = ("batch", "time", "heads", None), ("batch", key_time, "kv_heads", None)
    mask_axes = mask.sides(("batch", "time"), ("batch", key_time))

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
    """The indices of tokens in zigzag order over ``ways`` devices, int ``[length]``.

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

    Runs per device: ``q_bthc``, ``keys`` and ``mask`` are its shards. ``contiguous``: each device
    has consecutive tokens, so that with a window and a causal mask only keys of the nearest
    devices are required. ``options`` are those of `flash_attention`.
    """
    ways = jax.lax.axis_size(axis)
    steps = ways
    if contiguous and mask.window is not None and mask.causal and mask.until_bt is None:
        # in a segment, the distance of tokens in the sequence is the difference of positions
        steps = min(ways, 1 + -(-(mask.window - 1) // q_bthc.shape[1]))
    ring = _Ring(axis, ways, steps, tuple(sorted(options.items())))
    return _op(ring)(q_bthc, keys, mask, slopes_h, sinks_h)


class _Ring(NamedTuple):
    """Static arguments: mesh axis, its size, steps of the ring, options of `flash_attention`."""

    axis: str | tuple[str, ...]
    ways: int
    steps: int
    options: tuple[tuple[str, Any], ...]

    def shift(self, tree, by: int = 1):
        """``tree`` of the device whose index is lower by ``by`` (a ppermute)."""
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
        keys = ring.shift(keys)
        new_y, new_lse = attend(keys)
        joint_lse = jnp.logaddexp(lse, new_lse)
        y, new_y = (
            a * jnp.swapaxes(jnp.exp(part - joint_lse), 1, 2)[..., None]
            for a, part in ((y, lse), (new_y.astype(joint_lse.dtype), new_lse))
        )
        return (y + new_y, joint_lse, keys), None

    (y, lse_bht, _), _ = jax.lax.scan(step, (y, lse_bht, keys), length=ring.steps - 1)
    y = y.astype(q.dtype)
    return y, (y, lse_bht)


def _backward(ring: _Ring, arguments, saved, dy):
    q, local_keys, mask, slopes, sinks = arguments
    y, lse = saved
    dtype = lse.dtype

    def gradients(keys):
        results = attention_gradients(
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
        return [a.astype(dtype) for a in results]

    dq, dk, dv = gradients(local_keys)

    def step(carry, _):
        dq, dk, dv, keys = carry
        # gradients are passed on with their keys and values
        keys, dk, dv = ring.shift((keys, dk, dv))
        more_q, more_k, more_v = gradients(keys)
        return (dq + more_q, dk + more_k, dv + more_v, keys), None

    (dq, dk, dv, _), _ = jax.lax.scan(step, (dq, dk, dv, local_keys), length=ring.steps - 1)
    # back to the device that has these keys, in their dtype
    dk, dv = dk.astype(local_keys.k_bskc.dtype), dv.astype(local_keys.v_bskc.dtype)
    dk, dv = ring.shift((dk, dv), by=1 - ring.steps)
    d_sinks = None
    if sinks is not None:
        # a sink is a key with value 0
        delta = jnp.einsum("bthc,bthc->bht", dy.astype(dtype), y.astype(dtype))
        weight = jnp.exp(sinks.astype(dtype)[:, None] - lse)
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
    """Attention by two all-to-alls: between them, a device has all tokens of some heads."""
    ways = jax.lax.axis_size(axis)

    def to_heads(a):
        return jax.lax.all_to_all(a, axis, split_axis=2, concat_axis=1, tiled=True)

    def all_time(a):
        return jax.lax.all_gather(a, axis, axis=1, tiled=True)

    def local_heads(a_h):
        if a_h is None:
            return None
        count = a_h.shape[0] // ways
        return jax.lax.dynamic_slice_in_dim(a_h, jax.lax.axis_index(axis) * count, count)

    mask = mask.with_keys(keys.positions_bs, keys.segments_bs)
    y: Any = flash_attention(
        to_heads(q_bthc),
        to_heads(keys.k_bskc),
        to_heads(keys.v_bskc),
        jax.tree.map(all_time, mask),
        alibi_slopes_h=local_heads(slopes_h),
        sinks_h=local_heads(sinks_h),
        **options,
    )
    return jax.lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)
