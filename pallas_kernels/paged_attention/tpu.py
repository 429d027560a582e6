"""Paged attention on a TPU: Pallas kernels for the matrix unit, compiled by Mosaic.

A program of the grid ``(b, blocks of key heads, blocks of queries)`` copies a group of its row's
pages at a time from HBM to VMEM, page by page through the table, while it computes with the group
before. Codes are converted in VMEM; scales and minima multiply the products. The rows of a block of
scores ``[queries · g, slots]`` are the queries of all ``g`` query heads of a key head.

Which groups a block of queries may see, and whether every query sees every slot of a group, are
computed before the kernel runs (`ranges`) and prefetched as scalars. Pages that a row does not have
are not copied. Positions, segments and scales, a few bytes for each slot, are arranged by group
outside the kernel: their rows are not full lanes in a page.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.ranges import all_see, extremes, first_and_last, may_see
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, sees_a_key
from pallas_kernels.flash_attention.tpu import LANES, LAST, PLAIN, column, dot
from pallas_kernels.mask import Mask, sees
from pallas_kernels.paged_attention.pages import Pages, gathered, parts, unpacked
from pallas_kernels.paged_attention.rows import Rows

# Bytes of VMEM that a program's blocks may have; each TPU permits 16 MiB by default.
VMEM = 11 * 2**20
# The rows of a block of queries are a multiple of it.
ROWS = 16
SKIPPED, PARTLY_SEEN, SEEN = 0, 1, 2


def refusal(q: jax.Array, pages: Pages) -> str | None:
    """What the kernel does not support in a call with these queries and pages, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype} of queries: must be bfloat16 or float32"
    if q.shape[-1] > 1024:
        return f"{q.shape[-1]} channels per head: at most 1024 fit in VMEM"
    return refusal_of_pages(pages)


def refusal_of_pages(pages: Pages) -> str | None:
    """What a kernel does not support in these pages, or None."""
    for stored in (pages.keys, pages.values):
        if stored is None:
            continue
        if stored.dtype == "float16":
            return "pages of float16: must be bfloat16, float32, int8, int4 or float8_e4m3fn"
        tile = tile_of(stored.codes.dtype)
        if pages.page % tile:
            return f"pages of {pages.page} slots of {stored.dtype}: must be a multiple of {tile}"
    return None


def tile_of(dtype) -> int:
    """The slots in one tile of the hardware."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    slots: int  # of a group of pages
    groups: int
    page: int
    heads: int  # key heads of a program
    tokens: int  # of a block of queries
    q_blocks: int
    rows: int  # of a block of queries: tokens · g, padded
    key_parts: int
    value_parts: int
    width: int  # channels of a part of the values

    @property
    def pages(self) -> int:
        return self.slots // self.page

    @classmethod
    def of(cls, sizes: Mapping[str, int], channels: int, q: jax.Array, pages: Pages) -> "Shape":
        _, t, h, c = q.shape
        k, n, page = pages.keys.codes.shape[1], pages.table_bn.shape[1], pages.page
        least = math.lcm(page, LANES)
        slots = least * max(1, min(sizes["key"], up(n * page, least)) // least)
        tokens = min(t, max(1, sizes["query"] // (h // k)))
        rows = up(tokens * (h // k), ROWS)
        key_parts = parts(pages.keys)
        value_parts = key_parts if pages.values is None else parts(pages.values)
        width = channels // value_parts
        if pages.values is None:
            width = min(up(channels, LANES), c) if key_parts == 1 else c // key_parts

        def bytes_of(heads: int) -> int:
            """The bytes of all blocks and scratch, which are rounded up to full lanes."""
            one = sum(
                up(s.codes.shape[-1], LANES) * s.codes.dtype.itemsize
                for s in (pages.keys, pages.values)
                if s is not None
            )
            of_rows = 2 * LANES * 4 + up(c, LANES) * (4 * q.dtype.itemsize + 4)
            return heads * (2 * slots * one + rows * of_rows)

        heads = max([d for d in range(1, k + 1) if k % d == 0 and bytes_of(d) <= VMEM] or [1])
        return cls(
            slots, pl.cdiv(n * page, slots), page, heads, tokens, pl.cdiv(t, tokens), rows,
            key_parts, value_parts, width,
        )  # fmt: skip


def up(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return pl.cdiv(size, multiple) * multiple


def _kernel(spec: Spec, shape: Shape, has: tuple[bool, bool, bool, tuple[bool, ...]], dtype, *refs):
    table, first, last, visits, *refs = refs
    q_ref, q_side, slopes, sinks, k_pages, v_pages, k_side, scales, y_ref, *refs = refs
    k_buffer, v_buffer, side_buffer, scale_buffer, semaphores, top_ref, total_ref, acc_ref = refs
    has_slopes, has_sinks, has_values, has_numbers = has
    has_scales = any(has_numbers)
    b, head_block, i = (pl.program_id(axis) for axis in range(3))
    block = b * shape.q_blocks + i
    heads = pl.ds(head_block * shape.heads, shape.heads)
    first_group, last_group = first[block], last[block]

    def copies(j, buffer):
        """Pairs of a copy for group ``j`` and whether it is done."""
        semaphore = semaphores.at[buffer]
        yield pltpu.make_async_copy(k_side.at[b, j], side_buffer.at[buffer], semaphore), True
        if has_scales:
            source = scales.at[b, j, heads]
            yield pltpu.make_async_copy(source, scale_buffer.at[buffer], semaphore), True
        for n in range(shape.pages):
            page = table[(b * shape.groups + j) * shape.pages + n]
            for pages, to in ((k_pages, k_buffer), (v_pages, v_buffer))[: 1 + has_values]:
                source = pages.at[jnp.maximum(page, 0), heads]
                yield pltpu.make_async_copy(source, to.at[buffer, n], semaphore), page >= 0

    def each_copy(j, buffer, act):
        for copy, is_done in copies(j, buffer):
            pl.when(is_done)(functools.partial(act, copy))

    top_ref[...] = jnp.full_like(top_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(first_group <= last_group)
    def _():
        each_copy(first_group, 0, lambda copy: copy.start())

    size = (shape.rows, shape.slots)
    row_of = {n: i for i, n in enumerate(n for n in range(4) if has_numbers[n])}

    def compute(buffer, masked: bool):
        q_at, q_in, until = (q_side[0, 0, :, n : n + 1] for n in range(3))
        k_at, k_in = (side_buffer[buffer, n : n + 1, :] for n in range(2))
        distance = jnp.broadcast_to(q_at, size) - jnp.broadcast_to(k_at, size)
        seen = row_seen = slot_seen = None
        if masked:
            seen = sees(
                spec,
                jnp.broadcast_to(q_at, size),
                jnp.broadcast_to(k_at, size),
                jnp.broadcast_to(q_in, size) if spec.packed else None,
                jnp.broadcast_to(k_in, size) if spec.packed else None,
                jnp.broadcast_to(until, size) if spec.limits else None,
            )
            row_seen = jnp.max(jnp.where(seen, 1.0, 0.0), axis=0, keepdims=True)
            slot_seen = column(row_seen)

        def vectors(pages_buffer, head, count):
            codes = pages_buffer[buffer, :, head]
            codes = codes.reshape(shape.slots, codes.shape[-1])
            exact = dtype if codes.dtype == dtype else jnp.float32
            return unpacked(codes, count, exact)

        def numbers(head, n):
            """Scales or minima of all slots, ``[1, slots]``; None if there are none."""
            row = row_of.get(n)
            return None if row is None else scale_buffer[buffer, head, row : row + 1, :]

        def head_body(head, _):
            keys = vectors(k_buffer, head, shape.key_parts)
            q = [q_ref[0, head, 0, n] for n in range(shape.key_parts)]
            products = (dot(a, k.astype(dtype), LAST) for a, k in zip(q, keys, strict=True))
            s = functools.reduce(jnp.add, products)
            if (scale := numbers(head, 0)) is not None:
                s = s * scale
            if (minimum := numbers(head, 1)) is not None:
                sums = (a.astype(jnp.float32).sum(1, keepdims=True) for a in q)
                s = s + functools.reduce(jnp.add, sums) * minimum
            s = biased(spec, s, distance, slopes[head] if has_slopes else None)
            if seen is not None:
                s = jnp.where(seen, s, MASKED)
            top = top_ref[head]
            new_top = jnp.maximum(top, s.max(1, keepdims=True))
            weights = jnp.exp(s - new_top)
            shrink = jnp.exp(top - new_top)
            top_ref[head] = new_top
            total_ref[head] = total_ref[head] * shrink + weights.sum(1, keepdims=True)

            def of_seen(row):
                return row if row_seen is None else jnp.where(row_seen > 0, row, 0)

            least = 0.0
            if (minimum := numbers(head, 3)) is not None:
                least = (weights * of_seen(minimum)).sum(1, keepdims=True)
            if (scale := numbers(head, 2)) is not None:
                weights = weights * of_seen(scale)
            values = vectors(v_buffer, head, shape.value_parts) if has_values else keys
            for n, v in enumerate(values):
                if slot_seen is not None:  # what no query sees may be anything, also NaN
                    v = jnp.where(slot_seen > 0, v.astype(jnp.float32), 0)
                v = v[:, : shape.width].astype(dtype)
                y = dot(weights.astype(dtype), v, PLAIN) + least
                acc_ref[head, n] = acc_ref[head, n] * shrink + y
            return 0

        jax.lax.fori_loop(0, shape.heads, head_body, 0)

    def group(j, _):
        buffer = jax.lax.rem(j - first_group, 2)

        @pl.when(j < last_group)
        def _():
            each_copy(j + 1, 1 - buffer, lambda copy: copy.start())

        each_copy(j, buffer, lambda copy: copy.wait())
        visit = visits[block * shape.groups + j]

        @pl.when(visit == SEEN)
        def _():
            compute(buffer, False)

        @pl.when(visit == PARTLY_SEEN)
        def _():
            compute(buffer, True)

        return 0

    jax.lax.fori_loop(first_group, last_group + 1, group, 0)

    def result(head, _):
        top, total = top_ref[head], total_ref[head]
        sees_any = sees_a_key(top)
        keep = jnp.where(sees_any, 1.0, 0.0)
        if has_sinks:
            new_top = jnp.maximum(top, sinks[head])
            keep *= jnp.exp(top - new_top)
            total = total * keep + jnp.exp(sinks[head] - new_top)
        else:
            total = jnp.where(sees_any, total, 1.0)
        for n in range(shape.value_parts):
            y_ref[0, head, 0, n] = (acc_ref[head, n] * (keep / total)).astype(y_ref.dtype)
        return 0

    jax.lax.fori_loop(0, shape.heads, result, 0)


def forward(
    spec: Spec,
    channels: int,
    sizes: Mapping[str, int],
    q_bthc: jax.Array,
    pages: Pages,
    mask: Mask,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
) -> jax.Array:
    """``y_bthc``; arguments as in `reference.attention`."""
    shape = Shape.of(sizes, channels, q_bthc, pages)
    b, t, h, _ = q_bthc.shape
    k, dtype = pages.keys.codes.shape[1], q_bthc.dtype
    rows = Rows(b, t, k, h // k, shape.tokens, shape.rows)
    if "float32" in (pages.keys.dtype, pages.values.dtype if pages.values else None):
        dtype = jnp.dtype(jnp.float32)

    # the table without pages that have no token yet, for full groups
    n = pages.table_bn.shape[1]
    held = jnp.arange(n) * shape.page < pages.written_b[:, None]
    table = jnp.where(held, pages.table_bn, -1).astype(jnp.int32)
    table = jnp.pad(table, ((0, 0), (0, shape.groups * shape.pages - n)), constant_values=-1)
    pages = pages._replace(table_bn=table)
    mask = pages.key_mask(mask).padded(rows.length, table.shape[1] * shape.page)
    until = mask.q_positions_bt if mask.until_bt is None else mask.until_bt

    q_extremes = extremes(mask.q_positions_bt, mask.q_segments_bt, shape.tokens, mask.until_bt)
    k_extremes = extremes(mask.k_positions_bs, mask.k_segments_bs, shape.slots)
    q_extremes = jax.tree.map(lambda a: a[:, :, None], q_extremes)
    k_extremes = jax.tree.map(lambda a: a[:, None], k_extremes)
    see, clear = (f(spec, q_extremes, k_extremes) for f in (may_see, all_see))
    visits = jnp.where(see, jnp.where(clear, SEEN, PARTLY_SEEN), SKIPPED)  # [b, blocks, groups]
    first, last = first_and_last(see)

    q_side = (mask.q_positions_bt, -1), (mask.q_segments_bt, 0), (until, -1)
    q_side = jnp.stack([rows.by_token(a, value) for a, value in q_side], -1)
    k_side = jnp.stack([mask.k_positions_bs, mask.k_segments_bs], axis=1)
    k_side = jnp.swapaxes(k_side.reshape(b, 2, shape.groups, shape.slots), 1, 2)
    q = rows.queries(q_bthc, shape.key_parts).astype(dtype)
    values = pages.keys if pages.values is None else pages.values
    numbers = [pages.keys.scale, pages.keys.minimum, values.scale, values.minimum]
    present = [a for a in numbers if a is not None]
    scales = jnp.zeros((1, 1, k, 1, LANES), jnp.float32)
    if present:
        page_bn = jnp.maximum(table, 0)
        scales = jnp.stack([gathered(a, page_bn) for a in present], 2)
        scales = scales.reshape(b, k, len(present), shape.groups, shape.slots)
        scales = jnp.moveaxis(scales, 3, 1)  # [b, groups, k, …, slots]

    vector = (1, shape.heads, 1, shape.key_parts, shape.rows, q.shape[-1])
    result = (1, shape.heads, 1, shape.value_parts, shape.rows, shape.width)

    def block(b, heads, i, *_):
        return (b, heads, i, 0, 0, 0)

    def head_spec(a):
        return pl.BlockSpec((shape.heads, *a.shape[1:]), lambda b, heads, i, *_: (heads, 0, 0))

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    slopes, sinks = (rows.by_head(a)[..., None] for a in (slopes_h, sinks_h))

    def buffer(stored):
        codes = stored.codes
        return pltpu.VMEM((2, shape.pages, shape.heads, shape.page, codes.shape[-1]), codes.dtype)

    small = pltpu.VMEM((8, LANES), jnp.float32)
    column_shape = pltpu.VMEM((shape.heads, shape.rows, 1), jnp.float32)
    has = (
        slopes_h is not None,
        sinks_h is not None,
        pages.values is not None,
        tuple(a is not None for a in numbers),
    )
    y = pl.pallas_call(
        functools.partial(_kernel, spec, shape, has, dtype),
        out_shape=jax.ShapeDtypeStruct(
            (b, k, shape.q_blocks, *result[3:]), q_bthc.dtype
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(b, k // shape.heads, shape.q_blocks),
            in_specs=[
                pl.BlockSpec(vector, block),
                pl.BlockSpec((1, 1, shape.rows, 3), lambda b, heads, i, *_: (b, i, 0, 0)),
                head_spec(slopes),
                head_spec(sinks),
                *[in_hbm] * 4,
            ],
            out_specs=pl.BlockSpec(result, block),
            scratch_shapes=[
                buffer(pages.keys),
                small if pages.values is None else buffer(pages.values),
                pltpu.VMEM((2, 2, shape.slots), jnp.int32),
                pltpu.VMEM((2, shape.heads, len(present), shape.slots), jnp.float32)
                if present
                else small,
                pltpu.SemaphoreType.DMA((2,)),
                column_shape,
                column_shape,
                pltpu.VMEM((shape.heads, *result[3:]), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        name="paged_attention",
    )(
        table.reshape(-1), first.reshape(-1), last.reshape(-1), visits.reshape(-1),
        q, q_side, slopes, sinks, pages.keys.codes, values.codes, k_side, scales,
    )  # fmt: skip
    return rows.results(y)[..., :channels]
