"""Paged caches: keys and values of all rows in pages of a pool (PagedAttention, Kwon 2023)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.cache import Keys
from layers.config import check
from layers.sharding import per_device, reshard
from layers.state import CacheConfig, LayerState
from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention import paged_attention, update_pages
from pallas_kernels.stored import Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache(LayerState):
    """Keys and values of the tokens so far, in pages of a pool that all rows share.

    The ``i``-th token of row ``b`` is in slot ``i % page`` of page ``table_bn[b, i // page]``
    (arXiv:2309.06180, §4.1). A table is changed by `layers.state.with_table` between calls; a token
    that has no page (−1) is lost, so callers assign pages first. ``values`` is None if they are
    channels of the keys. On a mesh, heads are sharded; each device has its heads of all pages.
    """

    keys: Stored  # [p, k, page, c]
    values: Stored | None
    positions_ps: jax.Array  # int32
    segments_ps: jax.Array  # int32
    table_bn: jax.Array  # int32, −1 = no page
    written_b: jax.Array  # int32, tokens written so far

    @property
    def capacity(self) -> int:
        """The tokens that a row may have."""
        return self.table_bn.shape[-1] * self.positions_ps.shape[-1]

    @property
    def can_rewind(self) -> bool:
        return True

    @property
    def is_paged(self) -> bool:
        return True

    @classmethod
    def empty(
        cls,
        cache: CacheConfig,
        batch: int,
        max_length: int,
        kv_heads: int,
        channels: int,
        dtype: str,
        *,
        has_values: bool = True,
    ) -> "PagedCache":
        """A cache without tokens, stored in ``dtype``.

        If ``cache.pages`` are enough for all rows, row ``b`` has the pages from
        ``b · ceil(max_length / page)`` on. Else no row has a page.

        Raises:
          ConfigError: ``batch`` or ``max_length`` is not positive.
        """
        check(batch > 0, "batch", batch, "must be > 0")
        check(max_length > 0, "max_length", max_length, "must be > 0")
        n = -(-max_length // cache.page)
        pages = batch * n if cache.pages is None else cache.pages

        def store():
            stored = Stored.empty((pages, kv_heads, cache.page, channels), dtype)
            return jax.tree.map(lambda a: reshard(a, *_axes(a)), stored)

        table = jnp.arange(batch * n, dtype=jnp.int32).reshape(batch, n)
        slots = (pages, cache.page)
        return cls(
            keys=store(),
            values=store() if has_values else None,
            positions_ps=reshard(jnp.full(slots, -1, jnp.int32), None, None),
            segments_ps=reshard(jnp.zeros(slots, jnp.int32), None, None),
            table_bn=reshard(table if batch * n <= pages else jnp.full_like(table, -1), None, None),
            written_b=reshard(jnp.zeros((batch,), jnp.int32), None),
        )

    def extend(
        self,
        keys_btkc: jax.Array,
        values_btkc: jax.Array | None,
        positions_bt: jax.Array,
        segments_bt: jax.Array,
    ) -> "tuple[PagedCache, PagedCache]":
        """The cache with ``t`` more tokens, twice: its keys are seen where they are (`attend`).

        Tokens at position −1 (padding) are not written.

        Raises:
          ConfigError: ``t`` exceeds the tokens that a row may have. Only shapes are checked.
        """
        t = keys_btkc.shape[1]
        allowed = f"must be at most max_length={self.capacity} of the cache"
        check(t <= self.capacity, "tokens", t, allowed)
        token, row = (None, None, "kv_heads", None), (None, None)
        values_axes = None if values_btkc is None else token

        def update(cache: PagedCache, keys, values, positions, segments):
            stored = cache.keys, cache.values, cache.positions_ps, cache.segments_ps
            new = keys, values, positions, segments
            pools = update_pages(*stored, *new, cache.table_bn, cache.written_b)
            return tuple(jax.tree.leaves(pools))

        leaves = per_device(
            update,
            (self, keys_btkc, values_btkc, positions_bt, segments_bt),
            (self._sharding(), token, values_axes, row, row),
            [*(_axes(a) for a in jax.tree.leaves((self.keys, self.values))), row, row, (None,)],
        )
        old = self.keys, self.values, self.positions_ps, self.segments_ps, self.written_b
        names = ("keys", "values", "positions_ps", "segments_ps", "written_b")
        new = jax.tree.unflatten(jax.tree.structure(old), leaves)
        cache = dataclasses.replace(self, **dict(zip(names, new, strict=True)))
        return cache, cache

    def attend(
        self,
        q_bthc: jax.Array,
        mask: Mask,
        *,
        alibi_slopes_h: Any = None,
        sinks_h: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """`pallas_kernels.paged_attention` of queries over the pages, on the current mesh.

        ``mask`` has the positions of queries and their segments. ``options``: ``scale, soft_cap,
        value_channels, implementation``.
        """
        q_axes = (None, "time", "heads", None)
        mask = mask.with_keys(None, None)
        slopes_h = None if alibi_slopes_h is None else jnp.asarray(alibi_slopes_h)

        def attend(q, cache: PagedCache, mask, slopes, sinks):
            pages = cache.keys, cache.values, cache.positions_ps, cache.segments_ps
            rows = cache.table_bn, cache.written_b
            return paged_attention(
                q, *pages, *rows, mask, alibi_slopes_h=slopes, sinks_h=sinks, **options
            )

        y_bthc = per_device(
            attend,
            (q_bthc, self, mask, slopes_h, sinks_h),
            (q_axes, self._sharding(), mask.sides(q_axes[:2], None), ("heads",), ("heads",)),
            q_axes,
        )
        return reshard(y_bthc, "batch", "time", "heads", None)

    def gathered(self, dtype) -> Keys:
        """A copy of each row's keys and values ``[b, s, k, c]``; 0 where there is no token.

        It requires the memory of a contiguous cache; hooks read it.
        """
        page_bn = jnp.maximum(self.table_bn, 0)

        def rows(a_ps):
            return a_ps.at[page_bn].get(mode="clip").reshape(len(page_bn), -1)

        slots_s = jnp.arange(self.capacity)
        has_page_bs = jnp.repeat(self.table_bn >= 0, self.positions_ps.shape[1], axis=1)
        is_token_bs = (slots_s < self.written_b[:, None]) & has_page_bs

        def load(stored: Stored | None):
            if stored is None:
                return None
            a_bnksc = jax.tree.map(lambda a: a[page_bn], stored).load(dtype)
            a_bskc = jnp.swapaxes(a_bnksc, 2, 3).reshape(*is_token_bs.shape, -1, stored.channels)
            return jnp.where(is_token_bs[..., None, None], a_bskc, 0)

        keys = load(self.keys)
        assert keys is not None
        positions = jnp.where(is_token_bs, rows(self.positions_ps), -1)
        return Keys(keys, load(self.values), positions, rows(self.segments_ps))

    def rewind(self, count_b: jax.Array) -> "PagedCache":
        """The cache without the last ``count_b`` tokens of each row."""
        return dataclasses.replace(self, written_b=jnp.maximum(self.written_b - count_b, 0))

    def cleared(self) -> "PagedCache":
        """The cache without tokens; rows keep their pages."""
        return dataclasses.replace(self, written_b=jnp.zeros_like(self.written_b))

    def take_row(self, row: int | jax.Array) -> "PagedCache":
        """One row's table and count, with the pages of all rows."""
        table, written = (
            jax.lax.dynamic_slice_in_dim(a, row, 1) for a in (self.table_bn, self.written_b)
        )
        return dataclasses.replace(self, table_bn=table, written_b=written)

    def put_row(self, row: int | jax.Array, of_row: "PagedCache") -> "PagedCache":
        """The pages of ``of_row``, with its table and count as those of ``row``."""
        table, written = (
            jax.lax.dynamic_update_slice_in_dim(a, new, row, 0)
            for a, new in (
                (self.table_bn, of_row.table_bn),
                (self.written_b, of_row.written_b),
            )
        )
        return dataclasses.replace(of_row, table_bn=table, written_b=written)

    def with_table(self, table_bn: jax.Array) -> "PagedCache":
        """The cache with another table of pages; rows keep their counts of tokens."""
        shape, given = self.table_bn.shape, jnp.shape(table_bn)
        check(given == shape[-2:], "table.shape", given, f"must be {shape[-2:]}")
        table = jnp.broadcast_to(jnp.asarray(table_bn, jnp.int32), shape)
        table = reshard(table, *(None,) * len(shape))
        return dataclasses.replace(self, table_bn=table)

    def copy_page(self, source: int | jax.Array, target: int | jax.Array) -> "PagedCache":
        """The cache with a copy of page ``source`` as page ``target``."""

        def copy(a):
            page = jax.lax.dynamic_slice_in_dim(a, source, 1)
            return jax.lax.dynamic_update_slice_in_dim(a, page, target, 0)

        names = ("keys", "values", "positions_ps", "segments_ps")
        pools = {name: jax.tree.map(copy, getattr(self, name)) for name in names}
        return dataclasses.replace(self, **pools)

    def _sharding(self) -> "PagedCache":
        """The logical axes of each array."""
        keys, values = (jax.tree.map(_axes, a) for a in (self.keys, self.values))
        row: Any = (None, None)
        return PagedCache(keys, values, row, row, row, row[:1])


def _axes(array: jax.Array) -> tuple[str | None, ...]:
    """The logical axes of an array ``[p, k, page, …]``."""
    return (None, "kv_heads", *(None,) * (array.ndim - 2))
