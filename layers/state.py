"""What a sequence mixer remembers between calls: registered dataclasses, passed in and returned.

A state of attention has ``extend(keys, values, positions, segments) -> (state, keys to see)``,
which hides how its memory is laid out, and every state ``rewind(count_b) -> state``, which takes
tokens back where that is cheap and else says that it cannot.
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
    """Keys and values of the tokens seen so far, in ``s`` slots a row.

    Heads come first, as products of queries with keys want them: nothing is transposed to decode.

    Tokens fill slots in the order they are written, whatever their position, so that rows of
    different lengths and packed documents need no special case. A ``rolling`` cache (sliding-window
    attention, Jiang 2023, §2) reuses the slot of the oldest token; a contiguous one must be large
    enough: what does not fit is dropped, so callers check the length before (see `extend`).
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
        """``value_channels`` are as many as ``channels`` by default.

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
          ConfigError: ``t`` exceeds a contiguous cache's capacity (all that shapes alone can say).
        """
        t = keys_btkc.shape[1]
        new = self._write(keys_btkc, values_btkc, positions_bt, segments_bt)
        held = new._keys()
        if self.rolling and t > 1:
            # Writing many tokens overwrites keys that the first of them still see: they see what
            # was there before, and the new ones. One token overwrites only what left the window.
            more = Keys(keys_btkc, values_btkc, positions_bt, segments_bt)
            held = jax.tree.map(_append, self._keys(), more)
        return new, held

    def rewind(self, count_b: jax.Array) -> "KVCache":
        """The cache without the last ``count_b`` tokens of each row.

        Raises:
          ConfigError: a rolling cache, which has overwritten what would be seen again.
        """
        check(not self.rolling, "state", "rolling KVCache", "has overwritten what rewind needs")
        written = jnp.maximum(self.written_b - count_b, 0)
        kept = jnp.arange(self.capacity) < written[..., None]
        positions = jnp.where(kept, self.positions_bs, -1)
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
            f"the cache holds at most max_length={self.capacity}",
        )
        valid = positions_bt >= 0
        rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        slots = self.written_b[:, None] + rank
        if self.rolling:
            # two new tokens may claim one slot: only the last `capacity` of them are kept
            valid &= rank >= count[:, None] - self.capacity
            slots = slots % self.capacity
        slots = jnp.where(valid, slots, self.capacity)  # out of range: dropped by the scatter

        def put(old, new, *heads):
            """``new`` ``[b, t, …]`` in its slots, heads in front of them if there are any."""

            def local(old, new, slots):
                # as one list of places: XLA writes rows of a matrix where they are
                shape = old.shape if heads else (old.shape[0], 1, old.shape[1], 1)
                b, k, s, c = shape
                line = jnp.arange(b)[:, None, None] * k + jnp.arange(k)
                place = jnp.where(slots[..., None] < s, line * s + slots[..., None], b * k * s)
                flat = old.reshape(b * k * s, c)
                flat = flat.at[place].set(
                    new.reshape(*place.shape, c).astype(old.dtype), mode="drop"
                )
                return flat.reshape(old.shape)

            row = ("batch", None)
            axes = ("batch", *heads, None, None) if heads else row
            new_axes = (*row, *heads, None) if heads else row
            return per_device(local, (old, new, slots), (axes, new_axes, row), axes)

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
      ConfigError: a layer's state cannot take tokens back; it is named.
    """
    return jax.tree.map(
        lambda one: one.rewind(count_b), state, is_leaf=lambda node: hasattr(node, "rewind")
    )
