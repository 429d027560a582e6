"""Paged attention: attention over keys and values in pages that a table assigns to rows.

``y = softmax(bias(q kᵀ / √c)) v`` (Vaswani 2017, eq. 1), where the keys of a row of the batch are
in pages anywhere in a pool (PagedAttention, Kwon 2023, 2309.06180, §4.1). Slot ``i`` of a row, for
its ``i``-th token, is

    keys[table[row, i // page], :, i % page]    for i < written[row]

A query sees a slot if the row has a token in it (``i < written`` and ``table ≥ 0``) and the mask
permits it by the positions and segments of both. What no query of the row sees has no influence on
the result, also if it is NaN: a page may hold anything before its owner writes it.

The layout of a pool of ``p`` pages: vectors ``[p, k, page, c]`` in `pallas_kernels.stored.Stored`
(floating point, or int8, e4m3 and int4 with a scale for each token and head), positions and
segments ``[p, page]``. All heads of a page are next to each other, so that one copy moves them.

Queries are ``[b, t]`` tokens: one (decode), a chunk, or rows with fewer queries than ``t``, whose
other positions are −1. The result of a row does not depend on other rows, bit by bit: their
length, pages and queries, or its own index in the batch.

Without ``values``, the values are the first channels of the keys: the latents of latent attention
(DeepSeek-V2, 2405.04434, §2.1.2).

`update_pages` writes new tokens into the pages of their rows.

Implementations, and what each has in fast memory:

- ``reference``: a copy of all pages of each row, and all scores. The equation.
- ``xla``: a loop over groups of pages, which are copied next to each other; online softmax as in
  `pallas_kernels.flash_attention`. It ends after the last group that a row has.
- ``tpu``: one block of queries with its maximum, sum and values in VMEM; groups of pages are copied
  to VMEM through the table, the next while one is computed. `update_pages` replaces the slots of
  new tokens in VMEM, in place. Queries of float32 and bfloat16; a page must have a multiple of 8
  slots of float32, 16 of bfloat16, or 32 of the other dtypes. See `tpu` and `tpu_update`.
- ``gpu``: one block of queries with its maximum, sum and values in registers, which loads slots
  through the table; the slots of a row are split between programs. Queries of float32, bfloat16 and
  float16. See `gpu`. `update_pages` is XLA's scatter.

Codes are converted in fast memory; their scales and minima multiply the products, so that no
dequantised copy of a page is stored.

Limits: this is for inference. Gradients, of queries and of what is floating point in the pages, are
those of the reference (`pallas_kernels.derivatives`) and require its memory. Slopes of ALiBi are
constants. A value that is not finite also reaches queries of its row that do not see it, if another
query of the same call sees it. The kernels have been compiled for
TPUs, lowered for an H100 and run interpreted; they have not run on a TPU or a GPU yet.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocks import block_sizes
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import check, check_array, choose, per_platform
from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention import gpu, reference, tpu, tpu_update, xla
from pallas_kernels.paged_attention.pages import Pages, scattered
from pallas_kernels.paged_attention.tpu import refusal_of_pages
from pallas_kernels.stored import Stored

OP = "paged_attention"

# implementation → the platform whose block sizes (`pallas_kernels.blocks`) it has
PLATFORMS = {"xla": "cpu", "tpu": "tpu", "gpu": "gpu"}

FORWARD = {"xla": xla.forward, "tpu": tpu.forward, "gpu": gpu.forward}


def paged_attention(
    q_bthc: jax.Array,
    keys: Stored,
    values: Stored | None,
    positions_ps: jax.Array,
    segments_ps: jax.Array | None,
    table_bn: jax.Array,
    written_b: jax.Array,
    mask: Mask,
    *,
    value_channels: int | None = None,
    alibi_slopes_h: jax.Array | np.ndarray | None = None,
    soft_cap: float | None = None,
    sinks_h: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> jax.Array:
    """Attention of each query over the slots of its row that ``mask`` lets it see.

    It is 0 for a query that sees no slot. Scores and softmax are float32; the result has ``q``'s
    dtype.

    Args:
      q_bthc: queries, ``h`` heads of ``c`` channels.
      keys, values: vectors of the pool, ``[p, k, page, c]`` and ``[p, k, page, …]``, ``h % k ==
        0``. Query head ``i`` uses key head ``i // (h / k)``. ``values`` may be None.
      positions_ps: int32 ``[p, page]``, −1 for padding.
      segments_ps: int32 ``[p, page]``, or None if ``mask`` has no segments.
      table_bn: int32 ``[b, n]``: the pages of each row in the order of its tokens; −1: no page.
      written_b: int32, the tokens of each row; slots from there on are not seen.
      mask: positions of the queries, which are required, their segments and ``until``, ``causal``
        and ``window``. Positions and segments of keys are those of the pages.
      value_channels: if ``values`` is None, how many channels of a key are its value.
      alibi_slopes_h, soft_cap, sinks_h, scale: as in `pallas_kernels.flash_attention`.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes that override `pallas_kernels.blocks`: ``key``, the slots of a group of pages;
        for a named kernel also ``query``, the rows of a block of queries (each token has as many
        as query heads share a key head), and for ``"gpu"`` ``splits``, the most programs that the
        slots of a row are split between.

    Returns:
      ``[b, t, h, channels]`` with the channels of a value.

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    pages = Pages(keys, values, positions_ps, segments_ps, table_bn, written_b)
    spec, channels, arrays = _checked(
        q_bthc, pages, mask, value_channels, alibi_slopes_h, sinks_h, scale, soft_cap
    )
    refusals = {
        "xla": None,
        "tpu": tpu.refusal(q_bthc, pages),
        "gpu": gpu.refusal(q_bthc, pages),
    }
    chosen = choose(OP, implementation, refusals)
    if chosen == ["reference"]:
        return reference.attention(spec, channels, *arrays)
    sizes = tuple(
        (name, tuple(block_sizes(OP, PLATFORMS[name], blocks).items())) for name in chosen
    )
    return _op(spec, channels, sizes)(*arrays)


def update_pages(
    keys: Stored,
    values: Stored | None,
    positions_ps: jax.Array,
    segments_ps: jax.Array | None,
    k_btkc: jax.Array,
    v_btkc: jax.Array | None,
    positions_bt: jax.Array,
    segments_bt: jax.Array | None,
    table_bn: jax.Array,
    written_b: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[Stored, Stored | None, jax.Array, jax.Array | None, jax.Array]:
    """``keys, values, positions, segments, written`` with new tokens after those of each row.

    Tokens at position −1 are not written. A token whose row has no page for it is lost, so
    callers assign pages first. Donated arguments are updated in place. No two rows may have the
    page that a token is written to.

    Args:
      k_btkc, v_btkc, positions_bt, segments_bt: the new tokens, in the dtype of the calculation;
        ``v`` is None if ``values`` is, and ``segments_bt`` if ``segments_ps`` is.
      keys, …, written_b: as in `paged_attention`.
      implementation: as in `paged_attention`.

    Raises:
      ValueError: an argument has a shape or dtype that is not described here, or the named
        implementation does not support the call.
    """
    pages = Pages(keys, values, positions_ps, segments_ps, table_bn, written_b)
    b = _check_pages(pages)
    check(k_btkc.ndim == 4, "k.shape", k_btkc.shape, "must be [batch, time, heads, channels]")
    t = k_btkc.shape[1]
    for name, stored, array in (("k", keys, k_btkc), ("v", values, v_btkc)):
        if stored is None or array is None:
            given = "given" if array is not None else None
            check(stored is None and array is None, name, given, "values require v, and v values")
        else:
            check_array(name, array, (b, t, stored.codes.shape[1], stored.channels))
    check_array("positions", positions_bt, (b, t), "integer")
    both = (segments_bt is None) == (segments_ps is None)
    check(both, "segments", "one of two", "pages and tokens must both have segments, or neither")
    if segments_bt is not None:
        check_array("segments", segments_bt, (b, t), "integer")
    refusals = {"xla": None, "tpu": refusal_of_pages(pages)}
    chosen = choose("update_pages", implementation, refusals)
    put_codes = _put_codes(tuple(chosen))
    values_of_new = None if v_btkc is None or values is None else Stored.of(v_btkc, values.dtype)
    new = (Stored.of(k_btkc, keys.dtype), values_of_new, positions_bt, segments_bt)

    def put(old, new):
        put_one = put_codes if old.ndim == 4 else scattered
        return put_one(old, new, positions_bt, table_bn, written_b)

    count = jnp.sum(positions_bt >= 0, axis=1, dtype=written_b.dtype)
    return *jax.tree.map(put, pages[:4], new), written_b + count


def _check_pages(pages: Pages) -> int:
    """Check the arrays of ``pages``; returns the rows of the batch."""
    shape = pages.keys.codes.shape
    check(len(shape) == 4, "keys.shape", shape, "must be [pages, heads, slots, channels]")
    p, k, page, _ = shape
    check(min(shape) > 0, "keys.shape", shape, "no size may be 0")
    if pages.values is not None:
        values = pages.values.codes.shape
        check(values[:3] == shape[:3], "values.shape", values, f"must be {shape[:3]} and channels")
        check(len(values) == 4 and values[3] > 0, "values.shape", values, "must have channels")
    check_array("positions_ps", pages.positions_ps, (p, page), "integer")
    if pages.segments_ps is not None:
        check_array("segments_ps", pages.segments_ps, (p, page), "integer")
    table = pages.table_bn
    check(table.ndim == 2 and table.size > 0, "table.shape", table.shape, "must be [batch, pages]")
    check_array("table", table, table.shape, "integer")
    check_array("written", pages.written_b, table.shape[:1], "integer")
    return table.shape[0]


def _checked(
    q_bthc, pages: Pages, mask: Mask, value_channels, alibi_slopes_h, sinks_h, scale, soft_cap
) -> tuple[Spec, int, tuple[Any, ...]]:
    """The call's `Spec`, its channels of values and its checked arrays."""
    b = _check_pages(pages)
    k = pages.keys.codes.shape[1]
    check(q_bthc.ndim == 4, "q.shape", q_bthc.shape, "must be [batch, time, heads, channels]")
    _, t, h, _ = q_bthc.shape
    check(t > 0 and h > 0, "q.shape", q_bthc.shape, "no size may be 0")
    check_array("q", q_bthc, (b, t, h, pages.keys.channels))
    check(h % k == 0, "num_heads", h, f"must be a multiple of num_kv_heads={k}")
    if pages.values is None:
        most, given = pages.keys.channels, value_channels
        allowed = f"without values it must be in 1…{most}, the channels of a key"
        check(given is not None and 0 < given <= most, "value_channels", given, allowed)
        channels = value_channels
    else:
        check(value_channels is None, "value_channels", value_channels, "requires values=None")
        channels = pages.values.channels
    check(soft_cap is None or soft_cap > 0, "soft_cap", soft_cap, "must be > 0")
    check(mask.q_positions_bt is not None, "mask.q_positions", None, "is required")
    for name in ("k_positions_bs", "k_segments_bs"):
        given = None if getattr(mask, name) is None else "given"
        check(given is None, f"mask.{name}", given, "must be None: the pages have them")
    both = (mask.q_segments_bt is None) == (pages.segments_ps is None)
    check(both, "segments", "one of two", "queries and pages must both have segments, or neither")
    # as a mask with one key, which stands for the slots
    one = jnp.zeros((1, 1), jnp.int32)
    mask = mask.with_keys(one, None if pages.segments_ps is None else one).whole(b, t, 1)
    mask = mask.with_keys(None, None)
    slopes = None
    if alibi_slopes_h is not None:
        slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes_h))
        check_array("alibi_slopes", slopes, (h,))
    if sinks_h is not None:
        check_array("sinks", sinks_h, (h,))
    spec = Spec.of(mask, q_bthc.shape[-1], scale, soft_cap)
    return spec, channels, (q_bthc, pages, mask, slopes, sinks_h)


@functools.lru_cache(maxsize=256)
def _op(spec: Spec, channels: int, sizes):
    equation = functools.partial(reference.attention, spec, channels)

    def backward(arguments, _, dy_bthc):
        return jax.vjp(equation, *arguments)[1](dy_bthc)

    return differentiable(functools.partial(_forward, spec, channels, sizes), backward, equation)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(spec, channels, sizes, *arrays):
    table = {name: functools.partial(FORWARD[name], spec, channels, dict(s)) for name, s in sizes}
    return per_platform(list(table), table, *arrays), None


@functools.lru_cache
def _put_codes(chosen: tuple[str, ...]):
    """`scattered` by an implementation in ``chosen``, for codes."""
    if "tpu" not in chosen:
        return scattered
    table = {"xla": scattered, "tpu": tpu_update.written}

    def run(*arrays):
        return per_platform(chosen, table, *arrays)

    def backward(arrays, _, d_codes):
        return jax.vjp(scattered, *arrays)[1](d_codes)

    op = differentiable(lambda *arrays: (run(*arrays), None), backward, scattered)

    def put(old, new, *arrays):
        is_float = jnp.issubdtype(old.dtype, jnp.floating)
        return (op if is_float else run)(old, new, *arrays)

    return put
