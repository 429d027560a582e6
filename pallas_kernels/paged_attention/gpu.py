"""Paged attention on an NVIDIA GPU: a Pallas kernel for tensor cores, compiled by Triton.

A program of the grid ``(b · blocks of queries, k, splits)`` has one block of queries, with its
running maximum, sum and values in registers, and loops over blocks of slots, whose codes it loads
through the table. The rows of a block of scores are the queries of all query heads of a key head.

One query and few rows give few programs, so the slots of a row are split between several of them
(Flash-Decoding, Dao 2023); their results are added at the end, weighted by their maxima.

Blocks and channels are padded to a power of 2, at least 16, as tensor cores and Triton require;
pages are not.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.flash_attention.ranges import extremes, first_and_last, may_see
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, sees_a_key
from pallas_kernels.mask import Mask, sees
from pallas_kernels.paged_attention.pages import Pages, parts, unpacked
from pallas_kernels.paged_attention.rows import Rows
from pallas_kernels.triton_kernels import LAST, PLAIN, dot, named

# the minimum size of an axis in a product of tensor cores
LEAST = 16
# splits are added until there are as many programs: two for each multiprocessor of an H100
PROGRAMS = 264


def refusal(q: jax.Array, pages: Pages) -> str | None:
    """What the kernel does not support in a call with these queries and pages, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} of queries: must be bfloat16, float16 or float32"
    widest = max(q.shape[-1], 0 if pages.values is None else pages.values.channels)
    if widest > 256:
        return f"{widest} channels per head: at most 256 fit in registers"
    return None


class Shape(NamedTuple):
    """The static sizes of a call."""

    page: int
    key: int  # slots of a block
    splits: int
    k_parts: int
    v_parts: int
    k_packed: int  # bytes or numbers of a vector's codes
    v_packed: int
    width: int  # channels of a part of the values, padded


def _kernel(spec: Spec, shape: Shape, has, dtype, *refs):
    visit, table, slopes, q_side, k_side, q_ref, k_ref, v_ref, *refs = refs
    *number_refs, y_ref, top_ref, total_ref = refs
    has_slopes, has_values, has_numbers = has
    numbers_of = dict(zip((n for n in range(4) if has_numbers[n]), number_refs, strict=True))
    q = [q_ref[n] for n in range(shape.k_parts)]
    q_at, q_in, until = (q_side[n] for n in range(3))
    slope = slopes[...][:, None] if has_slopes else None
    first, last = visit[0], visit[1]
    count = pl.cdiv(last + 1 - first, shape.splits)
    first = first + pl.program_id(2) * count

    def vectors(ref, page_of, offset, packed, is_loaded):
        channels = jnp.arange(max(pl.next_power_of_2(packed), LEAST))
        mask = jnp.broadcast_to(is_loaded[:, None], (shape.key, channels.size))
        if channels.size > packed:
            mask &= channels[None, :] < packed
            channels = jnp.minimum(channels, packed - 1)
        place = ref.at[page_of[:, None], offset[:, None], channels[None, :]]
        if ref.dtype == jnp.float8_e4m3fn:  # Triton has no constant of this type
            return jnp.where(mask, triton.load(place, mask=mask).astype(jnp.float32), 0.0)
        return triton.load(place, mask=mask, other=0)

    def block(j, carry):
        top, total, *sums = carry
        slots = j * shape.key + jnp.arange(shape.key)
        here = pl.ds(j * shape.key, shape.key)
        k_at, k_in = k_side[0, here], k_side[1, here]
        seen = sees(
            spec,
            q_at[:, None],
            k_at[None, :],
            q_in[:, None] if spec.packed else None,
            k_in[None, :] if spec.packed else None,
            until[:, None] if spec.limits else None,
        )
        # what no query sees is not loaded: it may be anything, also NaN
        is_seen = jnp.max(seen.astype(jnp.int32), axis=0) > 0
        page_of, offset = table[jax.lax.div(slots, shape.page)], jax.lax.rem(slots, shape.page)
        page_of = jnp.maximum(page_of, 0)

        def numbers(n):
            ref = numbers_of.get(n)
            if ref is None:
                return None
            return triton.load(ref.at[page_of, offset], mask=is_seen, other=0.0)[None, :]

        codes = vectors(k_ref, page_of, offset, shape.k_packed, is_seen)
        keys = unpacked(codes, shape.k_parts, dtype)
        s = functools.reduce(jnp.add, (dot(a, k, LAST) for a, k in zip(q, keys, strict=True)))
        if (scale := numbers(0)) is not None:
            s = s * scale
        if (minimum := numbers(1)) is not None:
            of_q = functools.reduce(jnp.add, (a.astype(jnp.float32).sum(1) for a in q))
            s = s + of_q[:, None] * minimum
        s = biased(spec, s, q_at[:, None] - k_at[None, :], slope)
        s = jnp.where(seen, s, MASKED)
        new_top = jnp.maximum(top, s.max(1))
        weights = jnp.exp(s - new_top[:, None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(1)
        if (minimum := numbers(3)) is not None:
            sums = [y * shrink[:, None] + (weights * minimum).sum(1)[:, None] for y in sums]
        else:
            sums = [y * shrink[:, None] for y in sums]
        if (scale := numbers(2)) is not None:
            weights = weights * scale
        if has_values:
            codes = vectors(v_ref, page_of, offset, shape.v_packed, is_seen)
            values = unpacked(codes, shape.v_parts, dtype)
        else:
            values = keys
        sums = [y + dot(weights.astype(dtype), v, PLAIN) for y, v in zip(sums, values, strict=True)]
        return new_top, total, *sums

    rows = q[0].shape[0]
    start = (
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        *(jnp.zeros((rows, shape.width), jnp.float32) for _ in range(shape.v_parts)),
    )
    end = jnp.minimum(first + count, last + 1)
    top, total, *sums = jax.lax.fori_loop(first, end, block, start)
    top_ref[...], total_ref[...] = top, total
    for n, y in enumerate(sums):
        y_ref[n] = y


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
    b, t, h, _ = q_bthc.shape
    k, dtype = pages.keys.codes.shape[1], q_bthc.dtype
    values = pages.keys if pages.values is None else pages.values
    if "float32" in (pages.keys.dtype, values.dtype):
        dtype = jnp.dtype(jnp.float32)
    tokens = min(t, max(1, pl.next_power_of_2(sizes["query"]) // (h // k)))
    block_rows = max(pl.next_power_of_2(tokens * (h // k)), LEAST)
    rows = Rows(b, t, k, h // k, tokens, block_rows)
    packed = [a.codes.shape[-1] for a in (pages.keys, values)]
    width = max(pl.next_power_of_2(packed[1]), LEAST)
    shape = Shape(
        page=pages.page,
        key=max(pl.next_power_of_2(sizes["key"]), LEAST),
        splits=max(1, min(sizes["splits"], PROGRAMS // (b * k * rows.blocks))),
        k_parts=parts(pages.keys),
        v_parts=parts(values),
        k_packed=packed[0],
        v_packed=packed[1],
        width=width,
    )
    # a table for full blocks of slots
    slots = pl.cdiv(pages.table_bn.shape[1] * shape.page, shape.key) * shape.key
    table = pages.table_bn.astype(jnp.int32)
    table = jnp.pad(
        table, ((0, 0), (0, pl.cdiv(slots, shape.page) - table.shape[1])), constant_values=-1
    )
    mask = pages._replace(table_bn=table).key_mask(mask)
    mask = mask.padded(rows.length, max(slots, mask.k_positions_bs.shape[1]))
    mask = mask.with_keys(mask.k_positions_bs[:, :slots], mask.k_segments_bs[:, :slots])
    until = mask.q_positions_bt if mask.until_bt is None else mask.until_bt
    q_extremes = extremes(mask.q_positions_bt, mask.q_segments_bt, tokens, mask.until_bt)
    k_extremes = extremes(mask.k_positions_bs, mask.k_segments_bs, shape.key)
    q_extremes = jax.tree.map(lambda a: a[:, :, None], q_extremes)
    k_extremes = jax.tree.map(lambda a: a[:, None], k_extremes)
    visit = jnp.stack(first_and_last(may_see(spec, q_extremes, k_extremes)), -1)

    q_side = (mask.q_positions_bt, -1), (mask.q_segments_bt, 0), (until, -1)
    q_side = jnp.stack([rows.by_token(a, value) for a, value in q_side], 2)
    k_side = jnp.stack([mask.k_positions_bs, mask.k_segments_bs], axis=1)
    q = rows.queries(q_bthc, shape.k_parts).astype(dtype)
    full = max(pl.next_power_of_2(q.shape[-1]), LEAST)
    q = jnp.pad(q, (*[(0, 0)] * 5, (0, full - q.shape[-1])))
    slopes, sinks = rows.by_head(slopes_h), rows.by_head(sinks_h)
    numbers = [pages.keys.scale, pages.keys.minimum, values.scale, values.minimum]
    present = [a for a in numbers if a is not None]

    def of_query(i):
        return jax.lax.div(i, rows.blocks), jax.lax.rem(i, rows.blocks)

    def at_query(*tail):
        """Of the program's row and block of queries."""
        return lambda i, head, split: (*of_query(i), *tail)

    def pool(a):
        return pl.BlockSpec(
            (a.shape[0], None, *a.shape[2:]), lambda i, head, split: (0, head, *[0] * (a.ndim - 2))
        )

    def result(*tail):
        def index(i, head, split):
            row, n = of_query(i)
            return (row, head, n, split, *[0] * len(tail))

        shape_of_all = (b, k, rows.blocks, shape.splits, *tail)
        return (
            pl.BlockSpec((None, None, None, None, *tail), index),
            jax.ShapeDtypeStruct(shape_of_all, jnp.float32),
        )

    def at_queries(i, head, split):
        row, n = of_query(i)
        return (row, head, n, 0, 0, 0)

    outs = [result(shape.v_parts, block_rows, width), result(block_rows), result(block_rows)]
    has = (slopes_h is not None, pages.values is not None, tuple(a is not None for a in numbers))
    y, top, total = pl.pallas_call(
        named("paged_attention", _kernel, spec, shape, has, dtype),
        grid=(b * rows.blocks, k, shape.splits),
        in_specs=[
            pl.BlockSpec((None, None, 2), at_query(0)),
            pl.BlockSpec((None, table.shape[1]), lambda i, head, split: (of_query(i)[0], 0)),
            pl.BlockSpec((None, block_rows), lambda i, head, split: (head, 0)),
            pl.BlockSpec((None, None, 3, block_rows), at_query(0, 0)),
            pl.BlockSpec((None, 2, slots), lambda i, head, split: (of_query(i)[0], 0, 0)),
            pl.BlockSpec((None, None, None, *q.shape[3:]), at_queries),
            pool(pages.keys.codes),
            pool(values.codes),
            *(pool(a) for a in present),
        ],
        out_specs=[spec_of_out for spec_of_out, _ in outs],
        out_shape=[shape_of_out for _, shape_of_out in outs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="paged_attention",
    )(
        visit, table, slopes, q_side, k_side, q, pages.keys.codes, values.codes, *present
    )  # fmt: skip
    # the splits' results, weighted by their maxima; a split without a visible slot has weight 0
    best = top.max(3, keepdims=True)
    if sinks_h is not None:
        best = jnp.maximum(best, sinks[None, :, None, None])
    weight = jnp.where(sees_a_key(top), jnp.exp(top - best), 0)
    total = (total * weight).sum(3)
    if sinks_h is not None:
        total += jnp.exp(sinks[None, :, None] - best[:, :, :, 0])
    y = (y * weight[:, :, :, :, None, :, None]).sum(3)
    y = y / jnp.where(total > 0, total, 1)[:, :, :, None, :, None]
    y = y[..., : packed[1]]
    return rows.results(y)[..., :channels].astype(q_bthc.dtype)
