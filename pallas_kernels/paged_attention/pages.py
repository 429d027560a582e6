"""Pages of keys and values, and the slots of a row in them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mask import Mask
from pallas_kernels.stored import Stored


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

    def of_slots(self, slots_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The page of each slot, ``p`` where the row has none, and the slot in that page."""
        n = self.table_bn.shape[1]
        column = jnp.clip(slots_bt // self.page, 0, n - 1)
        page_bt = jnp.take_along_axis(self.table_bn, column, axis=1)
        exists = (slots_bt >= 0) & (slots_bt < n * self.page) & (page_bt >= 0)
        return jnp.where(exists, page_bt, self.positions_ps.shape[0]), slots_bt % self.page

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


def gathered(stored: Stored, page_bn: jax.Array) -> Stored:
    """The slots of the pages ``page_bn`` in their order: ``[b, k, n · page, …]``."""
    b, n = page_bn.shape

    def gather(array):
        p, k, page, *vector = array.shape
        # rows of one matrix, each a page of one head: XLA copies them as they are
        row = page_bn[:, None, :] * k + jnp.arange(k)[:, None]
        return array.reshape(p * k, -1)[row].reshape(b, k, n * page, *vector)

    return jax.tree.map(gather, stored)


def written(pages: Pages, new: tuple, positions_bt: jax.Array) -> Pages:
    """``pages`` with new tokens after those of each row; padding is not written.

    ``new``: the tokens' keys, values, positions and segments, ``[b, t, …]``, as they are stored.
    """
    slots_bt, written_b = new_slots(pages, positions_bt)
    page_bt, offset_bt = pages.of_slots(slots_bt)

    def put(old, new):
        # as rows of one matrix, which XLA writes in place; the row of no page is out of range
        if old.ndim == 2:
            row = page_bt * pages.page + offset_bt
            return old.reshape(-1).at[row].set(new, mode="drop").reshape(old.shape)
        p, k, page, *vector = old.shape
        row = (page_bt[..., None] * k + jnp.arange(k)) * page + offset_bt[..., None]
        flat = old.reshape(p * k * page, *vector).at[row].set(new.astype(old.dtype), mode="drop")
        return flat.reshape(old.shape)

    keys, values, positions_ps, segments_ps = jax.tree.map(put, pages[:4], new)
    return Pages(keys, values, positions_ps, segments_ps, pages.table_bn, written_b)


def new_slots(pages: Pages, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slot of each new token, −1 for padding, and the number of tokens of each row after."""
    valid = positions_bt >= 0
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    slots_bt = jnp.where(valid, pages.written_b[:, None] + rank, -1)
    return slots_bt, pages.written_b + jnp.sum(valid, axis=1, dtype=jnp.int32)
