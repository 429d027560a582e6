"""States of sequence mixers between calls: registered dataclasses, passed in and returned.

A state of attention has ``extend(keys, values, positions, segments) -> (state, keys to see)``,
which hides how keys are stored. Every state has ``rewind(count_b) -> state``, which removes the
last tokens if that is cheap, and else raises an error.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.config import check
from layers.sharding import axes_of, per_device, reshard, spec


class Keys(NamedTuple):
    """Keys with their values, positions and segments (None if there are none)."""

    k_bskc: jax.Array
    v_bskc: jax.Array
    positions_bs: jax.Array
    segments_bs: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in ``s`` slots for each row.

    Heads come before slots, as in the products of queries with keys: decoding transposes nothing.

    Tokens fill slots in the order in which they are written, for any positions. So rows of
    different lengths and packed documents require no special case. A ``rolling`` cache
    (sliding-window attention, Jiang 2023, §2) reuses the slot of the oldest token. A contiguous
    one must be large enough: further tokens are dropped, so callers check the length first (see
    `extend`).
    """

    keys_bksc: jax.Array
    values_bksc: jax.Array
    positions_bs: jax.Array  # int32, −1 = empty
    segments_bs: jax.Array  # int32, 0 = none
    written_b: jax.Array  # int32, tokens written so far
    rolling: bool = dataclasses.field(metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        return self.keys_bksc.shape[-2]

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        channels: int,
        dtype,
        *,
        rolling: bool,
        value_channels: int | None = None,
    ) -> "KVCache":
        """A cache without tokens; ``value_channels`` defaults to ``channels``.

        Raises:
          ConfigError: ``batch`` or ``capacity`` is not positive.
        """
        check(batch > 0, "batch", batch, "must be > 0")
        check(capacity > 0, "max_length", capacity, "must be > 0")
        values = channels if value_channels is None else value_channels
        heads, row = ("batch", "kv_heads", None, None), ("batch", None)
        return cls(
            keys_bksc=reshard(jnp.zeros((batch, kv_heads, capacity, channels), dtype), *heads),
            values_bksc=reshard(jnp.zeros((batch, kv_heads, capacity, values), dtype), *heads),
            positions_bs=reshard(jnp.full((batch, capacity), -1, jnp.int32), *row),
            segments_bs=reshard(jnp.zeros((batch, capacity), jnp.int32), *row),
            written_b=reshard(jnp.zeros((batch,), jnp.int32), "batch"),
            rolling=rolling,
        )

    def extend(
        self,
        keys_btkc: jax.Array,
        values_btkc: jax.Array,
        positions_bt: jax.Array,
        segments_bt: jax.Array,
    ) -> "tuple[KVCache, Keys]":
        """The cache with ``t`` more tokens, and the keys that their queries may see.

        Tokens at position −1 (padding) are not written.

        Raises:
          ConfigError: ``t`` exceeds a contiguous cache's capacity. Only shapes are checked.
        """
        t = keys_btkc.shape[1]
        new = self._write(keys_btkc, values_btkc, positions_bt, segments_bt)
        visible = new._keys()
        if self.rolling and t > 1:
            # Several new tokens overwrite keys that the first of them still see. So they see the
            # keys of the old cache and the new ones. One token overwrites only a key that is
            # outside the window.
            new_keys = Keys(keys_btkc, values_btkc, positions_bt, segments_bt)
            visible = jax.tree.map(_append, self._keys(), new_keys)
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

    def _keys(self) -> Keys:
        k, v = (jnp.swapaxes(a, 1, 2) for a in (self.keys_bksc, self.values_bksc))
        return Keys(k, v, self.positions_bs, self.segments_bs)

    def _write(self, keys_btkc, values_btkc, positions_bt, segments_bt) -> "KVCache":
        t = keys_btkc.shape[1]
        check(
            self.rolling or t <= self.capacity,
            "tokens",
            t,
            f"must be at most max_length={self.capacity} of the cache",
        )
        valid = positions_bt >= 0
        rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        slots = self.written_b[:, None] + rank
        if self.rolling:
            # only the last `capacity` new tokens are written, so that no two have the same slot
            valid &= rank >= count[:, None] - self.capacity
            slots = slots % self.capacity
        slots = jnp.where(valid, slots, self.capacity)  # out of range: the scatter drops it

        def put(old, new, *heads):
            """``old`` with ``new`` ``[b, t, …]`` in its slots, which come after heads, if any."""

            def write_shards(old, new, slots):
                # as rows of one matrix, which XLA writes in place
                shape = old.shape if heads else (old.shape[0], 1, old.shape[1], 1)
                b, k, s, c = shape
                row_index = jnp.arange(b)[:, None, None] * k + jnp.arange(k)
                index = jnp.where(slots[..., None] < s, row_index * s + slots[..., None], b * k * s)
                flat = old.reshape(b * k * s, c)
                flat = flat.at[index].set(
                    new.reshape(*index.shape, c).astype(old.dtype), mode="drop"
                )
                return flat.reshape(old.shape)

            row = ("batch", None)
            axes = ("batch", *heads, None, None) if heads else row
            new_axes = (*row, *heads, None) if heads else row
            return per_device(write_shards, (old, new, slots), (axes, new_axes, row), axes)

        return dataclasses.replace(
            self,
            keys_bksc=put(self.keys_bksc, keys_btkc, "kv_heads"),
            values_bksc=put(self.values_bksc, values_btkc, "kv_heads"),
            positions_bs=put(self.positions_bs, positions_bt),
            segments_bs=put(self.segments_bs, segments_bt),
            written_b=self.written_b + count,
        )


def _append(old: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(old.dtype)
    if spec() is not None:
        new = jax.sharding.reshard(new, axes_of(old))
    return jnp.concatenate((old, new), axis=1)


def rewind(state: Any, count_b: jax.Array) -> Any:
    """A decoder's ``state`` without the last ``count_b`` tokens of each row.

    Raises:
      ConfigError: the state of a layer, which is named, does not support it.
    """
    return jax.tree.map(
        lambda layer_state: layer_state.rewind(count_b),
        state,
        is_leaf=lambda node: hasattr(node, "rewind"),
    )
