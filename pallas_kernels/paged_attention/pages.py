"""Pages of keys and values, and the slots of a row in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mask import Mask
from pallas_kernels.stored import Stored, write_rows


class Pages(NamedTuple):
    """A pool of ``p`` pages, and which pages each row of the batch has.

    Slot ``i`` of a row is slot ``i % page`` of page ``table[row, i // page]``. A row's first
    ``written`` slots have tokens; the content of the other slots is not defined.
    """

    keys: Stored  # [p, k, page, c]
    values: Stored | None  # [p, k, page, …]; None: the first channels of the keys
    positions_ps: jax.Array  # int32; −1 is padding
    segments_ps: jax.Array | None  # int32
    table_bn: jax.Array  # int32; −1: no page
    written_b: jax.Array  # int32

    @property
    def page(self) -> int:
        """The slots of a page."""
        return self.positions_ps.shape[1]

    def key_mask(self, mask: Mask) -> Mask:
        """``mask`` with the row's slots as keys; slots without a token are padding."""
        b, n = self.table_bn.shape
        page_bn = jnp.maximum(self.table_bn, 0)
        holds = jnp.arange(n * self.page) < self.written_b[:, None]
        holds &= jnp.repeat(self.table_bn >= 0, self.page, axis=1)
        k_at = jnp.where(holds, self.positions_ps[page_bn].reshape(b, -1), -1)
        k_in = None
        if self.segments_ps is not None:
            k_in = self.segments_ps[page_bn].reshape(b, -1)
        return mask.with_keys(k_at, k_in)


def parts(stored: Stored) -> int:
    """Into how many consecutive parts of its channels the codes of a vector are packed."""
    return 2 if stored.dtype == "int4" else 1


def unpacked(codes: jax.Array, count: int, dtype) -> list[jax.Array]:
    """The `parts` of ``codes`` ``[…, c / count]`` as arrays of ``dtype``; exact."""
    if count == 1:
        return [codes.astype(dtype)]
    codes = codes.astype(jnp.int32)
    return [(codes & 15).astype(dtype), (codes >> 4).astype(dtype)]


def gathered(stored: Any, page_bn: jax.Array) -> Any:
    """The slots of the pages ``page_bn``, in their order: ``[b, k, n · page, …]``.

    ``stored``: a `Stored`, or one of its arrays ``[p, k, page, …]``.
    """
    b, n = page_bn.shape

    def gather(array):
        p, k, page, *vector = array.shape
        # rows of one matrix, each a page of one head: XLA copies them as they are
        row = page_bn[:, None, :] * k + jnp.arange(k)[:, None]
        return array.reshape(p * k, -1)[row].reshape(b, k, n * page, *vector)

    return jax.tree.map(gather, stored)


def new_slots(positions_bt: jax.Array, written_b: jax.Array) -> jax.Array:
    """The slot of each new token, −1 for padding."""
    valid = positions_bt >= 0
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    return jnp.where(valid, written_b[:, None] + rank, -1)


def page_of(slots_bt: jax.Array, table_bn: jax.Array, page: int) -> jax.Array:
    """The page that each slot is in, −1 where the row has none."""
    n = table_bn.shape[1]
    pages = jnp.take_along_axis(table_bn, jnp.clip(slots_bt // page, 0, n - 1), axis=1)
    return jnp.where((slots_bt >= 0) & (slots_bt < n * page), pages, -1)


def scattered(old, new, positions_bt, table_bn, written_b) -> jax.Array:
    """An array of a pool, ``[p, k, page, …]`` or ``[p, page]``, with the numbers of new tokens.

    ``new``: ``[b, t, k, …]`` or ``[b, t]``. It is one scatter into the rows of a matrix.
    """
    p, k, page, *vector = old.shape if old.ndim > 2 else (old.shape[0], 1, old.shape[1])
    slots_bt = new_slots(positions_bt, written_b)
    page_bt = page_of(slots_bt, table_bn, page)
    row = (page_bt[..., None] * k + jnp.arange(k)) * page + (slots_bt % page)[..., None]
    row = jnp.where(page_bt[..., None] >= 0, row, p * k * page)  # out of range: it is dropped
    rows = old.reshape(p * k * page, *vector)
    return write_rows(rows, row.reshape(-1), new.reshape(-1, *vector)).reshape(old.shape)
