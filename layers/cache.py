"""Caches of keys and values: contiguous and rolling ones."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.config import check
from layers.sharding import axes_of, per_device, reshard, spec
from layers.state import LayerState
from pallas_kernels.stored import Stored, write_rows

ROW = ("batch", None)


class Keys(NamedTuple):
    """Keys with their values, positions and segments (None if there are none).

    Values are None in latent attention, where they are channels of the keys.
    """

    k_bskc: jax.Array
    v_bskc: jax.Array | None
    positions_bs: jax.Array
    segments_bs: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(LayerState):
    """Keys and values of the tokens so far, in ``s`` slots for each row.

    Heads come before slots, as in the products of queries with keys: decoding transposes nothing.
    ``keys``: ``[b, k, s, c]``; ``values`` likewise, None if they are channels of the keys.

    Tokens fill slots in the order in which they are written, for any positions. So rows of
    different lengths and packed documents require no special case. A ``rolling`` cache
    (sliding-window attention, Jiang 2023, §2) reuses the slot of the oldest token. A contiguous
    one must be large enough: further tokens are dropped, so callers check the length first (see
    `extend`).
    """

    keys: Stored
    values: Stored | None
    positions_bs: jax.Array  # int32, −1 = empty
    segments_bs: jax.Array  # int32, 0 = none
    written_b: jax.Array  # int32, tokens written so far
    rolling: bool = dataclasses.field(metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        return self.positions_bs.shape[-1]

    @property
    def can_rewind(self) -> bool:
        return not self.rolling

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        channels: int,
        dtype: str,
        *,
        rolling: bool,
        has_values: bool = True,
    ) -> "KVCache":
        """A cache without tokens, stored in ``dtype`` of `pallas_kernels.stored.DTYPES`.

        Raises:
          ConfigError: ``batch`` or ``capacity`` is not positive.
        """
        check(batch > 0, "batch", batch, "must be > 0")
        check(capacity > 0, "max_length", capacity, "must be > 0")

        def store():
            stored = Stored.empty((batch, kv_heads, capacity, channels), dtype)
            return jax.tree.map(lambda a: reshard(a, *_axes(a)), stored)

        return cls(
            keys=store(),
            values=store() if has_values else None,
            positions_bs=reshard(jnp.full((batch, capacity), -1, jnp.int32), *ROW),
            segments_bs=reshard(jnp.zeros((batch, capacity), jnp.int32), *ROW),
            written_b=reshard(jnp.zeros((batch,), jnp.int32), "batch"),
            rolling=rolling,
        )

    def extend(
        self,
        keys_btkc: jax.Array,
        values_btkc: jax.Array | None,
        positions_bt: jax.Array,
        segments_bt: jax.Array,
    ) -> "tuple[KVCache, Keys]":
        """The cache with ``t`` more tokens, and the keys that their queries may see.

        These have the dtype of ``keys_btkc``, and new ones are rounded as stored ones are. Tokens
        at position −1 (padding) are not written.

        Raises:
          ConfigError: ``t`` exceeds a contiguous cache's capacity. Only shapes are checked.
        """
        t, dtype = keys_btkc.shape[1], keys_btkc.dtype
        check(
            self.rolling or t <= self.capacity,
            "tokens",
            t,
            f"must be at most max_length={self.capacity} of the cache",
        )
        new_keys = Stored.of(keys_btkc, self.keys.dtype)
        new_values = None
        if self.values is not None and values_btkc is not None:
            new_values = Stored.of(values_btkc, self.values.dtype)
        new = self._write(new_keys, new_values, positions_bt, segments_bt)
        visible = new._keys(dtype)
        if self.rolling and t > 1:
            # Several new tokens overwrite keys that the first of them still see. So they see the
            # keys of the old cache and the new ones. One token overwrites only a key that is
            # outside the window.
            v = None if new_values is None else new_values.load(dtype)
            new_visible = Keys(new_keys.load(dtype), v, positions_bt, segments_bt)
            visible = jax.tree.map(_append, self._keys(dtype), new_visible)
        return new, visible

    def rewind(self, count_b: jax.Array) -> "KVCache":
        """The cache without the last ``count_b`` tokens of each row.

        Raises:
          ConfigError: the cache is rolling: tokens that would be seen again are overwritten.
        """
        check(not self.rolling, "state", "rolling KVCache", "does not support rewind")
        written = jnp.maximum(self.written_b - count_b, 0)
        is_kept = jnp.arange(self.capacity) < written[..., None]
        positions = jnp.where(is_kept, self.positions_bs, -1)
        return dataclasses.replace(self, positions_bs=positions, written_b=written)

    def cleared(self) -> "KVCache":
        """The cache without tokens. Keys and values are 0: a masked NaN would reach results."""
        zeros = jax.tree.map(jnp.zeros_like, self)
        return dataclasses.replace(zeros, positions_bs=jnp.full_like(self.positions_bs, -1))

    def _keys(self, dtype) -> Keys:
        def load(stored: Stored):
            return jnp.swapaxes(stored.load(dtype), 1, 2)

        values = None if self.values is None else load(self.values)
        return Keys(load(self.keys), values, self.positions_bs, self.segments_bs)

    def _write(self, keys, values, positions_bt, segments_bt) -> "KVCache":
        valid = positions_bt >= 0
        rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        slots = self.written_b[:, None] + rank
        if self.rolling:
            # only the last `capacity` new tokens are written, so that no two have the same slot
            valid &= rank >= count[:, None] - self.capacity
            slots = slots % self.capacity
        slots = jnp.where(valid, slots, self.capacity)  # out of range: the scatter drops it

        def put(old, new):
            """``old`` ``[b, k, s, …]`` with ``new`` ``[b, t, k, …]`` in its slots."""
            axes, new_axes = _axes(old), ("batch", None, *_axes(old)[1:2], *_axes(old)[3:])
            return per_device(_write_slots, (old, new, slots), (axes, new_axes, ROW), axes)

        def put_row(old_bs, new_bt):
            return per_device(
                lambda old, new, slots: _write_slots(old[:, None], new[:, :, None], slots)[:, 0],
                (old_bs, new_bt, slots),
                (ROW, ROW, ROW),
                ROW,
            )

        return dataclasses.replace(
            self,
            keys=jax.tree.map(put, self.keys, keys),
            values=jax.tree.map(put, self.values, values),
            positions_bs=put_row(self.positions_bs, positions_bt),
            segments_bs=put_row(self.segments_bs, segments_bt),
            written_b=self.written_b + count,
        )


def _axes(array: jax.Array) -> tuple[str | None, ...]:
    """The logical axes of an array ``[b, k, s, …]``."""
    return ("batch", "kv_heads", *(None,) * (array.ndim - 2))


def _write_slots(old: jax.Array, new: jax.Array, slots_bt: jax.Array) -> jax.Array:
    """``old`` ``[b, k, s, …]`` with ``new`` ``[b, t, k, …]``; a slot of ``s`` is dropped."""
    b, k, s, *c = old.shape
    # as rows of one matrix
    row_index = jnp.arange(b)[:, None, None] * k + jnp.arange(k)
    slots = slots_bt[..., None]
    index = jnp.where(slots < s, row_index * s + slots, b * k * s)
    rows = write_rows(old.reshape(b * k * s, *c), index.reshape(-1), new.reshape(-1, *c))
    return rows.reshape(old.shape)


def _append(old: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(old.dtype)
    if spec() is not None:
        new = jax.sharding.reshard(new, axes_of(old))
    return jnp.concatenate((old, new), axis=1)
