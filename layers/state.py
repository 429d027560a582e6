"""What a sequence mixer remembers between calls: registered dataclasses, passed in and returned."""

import dataclasses

import jax
import jax.numpy as jnp

from layers.config import check
from layers.sharding import island, place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, in ``s`` slots a row.

    Tokens fill slots in the order they are written, whatever their position, so that rows of
    different lengths and packed documents need no special case. A ``rolling`` cache (sliding-window
    attention, Jiang 2023, §2) reuses the slot of the oldest token; a contiguous one must be large
    enough: what does not fit is dropped, so callers check the length before (see `write`).
    """

    keys_bskc: jax.Array
    values_bskc: jax.Array
    positions_bs: jax.Array  # int32, −1 = empty
    segments_bs: jax.Array  # int32, 0 = none
    written_b: jax.Array  # int32, tokens written so far
    rolling: bool = dataclasses.field(metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        return self.keys_bskc.shape[-3]

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
        heads, row = ("batch", None, "kv_heads", None), ("batch", None)
        return cls(
            keys_bskc=place(jnp.zeros((batch, capacity, kv_heads, channels), dtype), *heads),
            values_bskc=place(jnp.zeros((batch, capacity, kv_heads, values), dtype), *heads),
            positions_bs=place(jnp.full((batch, capacity), -1, jnp.int32), *row),
            segments_bs=place(jnp.zeros((batch, capacity), jnp.int32), *row),
            written_b=place(jnp.zeros((batch,), jnp.int32), "batch"),
            rolling=rolling,
        )

    def write(
        self,
        keys_btkc: jax.Array,
        values_btkc: jax.Array,
        positions_bt: jax.Array,
        segments_bt: jax.Array,
    ) -> "KVCache":
        """The cache with ``t`` more tokens; those at position −1 (padding) are not written.

        Raises:
          ConfigError: ``t`` exceeds a contiguous cache's capacity (all that shapes alone can tell).
        """
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

        def put(old, new, *rest):
            def local(old, new, slots):
                rows = jnp.arange(old.shape[0])[:, None]
                return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

            axes, row = ("batch", None, *rest), ("batch", None)
            return island(local, (old, new, slots), (axes, axes, row), axes)

        return dataclasses.replace(
            self,
            keys_bskc=put(self.keys_bskc, keys_btkc, "kv_heads", None),
            values_bskc=put(self.values_bskc, values_btkc, "kv_heads", None),
            positions_bs=put(self.positions_bs, positions_bt),
            segments_bs=put(self.segments_bs, segments_bt),
            written_b=self.written_b + count,
        )
