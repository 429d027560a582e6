"""Flash attention on an NVIDIA GPU: Pallas kernels for tensor cores, compiled by Triton.

A program of the forward grid ``(queries, h, b)`` has one block of queries, with its running
maximum, sum and values in registers, and loops over blocks of keys. These are computed before the
kernel runs (`ranges.Visit`, four numbers for each block of queries): first those that it sees
entirely, in a loop without a mask, then those before and after them. Neither loop has a branch, so
that Triton can load the next block during a product; a block between them that no query sees is
masked like the others.

Lengths are padded to full blocks and channels to a power of 2, at least 16, as tensor cores and
Triton require. For products of float32 see `triton_kernels`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.flash_attention import gpu_hopper
from pallas_kernels.flash_attention.ranges import Visit, all_see, extremes, may_see
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, sees_a_key
from pallas_kernels.mask import Mask, sees
from pallas_kernels.triton_kernels import LAST, PLAIN, dot, named

# the minimum size of an axis in a product of tensor cores
LEAST = 16


def refusal(q) -> str | None:
    """What the kernels do not support in a call with the queries ``q``, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype}: must be bfloat16, float16 or float32"
    if q.shape[-1] > 256:
        return f"{q.shape[-1]} channels per head: at most 256 fit in registers"
    return None


class Side(NamedTuple):
    """Positions, segments and ``until`` of queries or of keys: references, or a block's values."""

    at: Any
    inside: Any
    until: Any = None

    def read(self, here: Any = ...) -> "Side":
        """The values at the indices ``here`` of references."""
        return Side(*(None if ref is None else ref[here] for ref in self))


def sides(refs) -> tuple[Side, Side]:
    """The sides of queries and of keys, from references in the order of `Mask.arrays`."""
    q_at, k_at, q_in, k_in, *until = refs
    return Side(q_at, q_in, *until), Side(k_at, k_in)


def scores(spec: Spec, q, k, q_side: Side, k_side: Side, slope, masked: bool):
    """Scores ``[queries, keys]``, and whether each query sees each key (None: all)."""
    q_at, k_at = q_side.at[:, None], k_side.at[None, :]
    result = biased(spec, dot(q, k, LAST), q_at - k_at, slope)
    if not masked:
        return result, None
    q_in = k_in = until = None
    if spec.packed:
        q_in, k_in = q_side.inside[:, None], k_side.inside[None, :]
    if spec.limits:
        until = q_side.until[:, None]
    return result, sees(spec, q_at, k_at, q_in, k_in, until)


def visits(row, body, carry, cleared: bool = False):
    """``carry`` after ``body(masked)(block, carry)`` for all blocks of the `Visit` in ``row``.

    ``cleared``: ``carry`` already has the blocks without a mask.
    """
    visit = Visit(*(row[i] for i in range(4)))
    return visit.loop(body(True), (lambda _, carry: carry) if cleared else body(False), carry)


def _forward_kernel(spec: Spec, key: int, has, *refs):
    count = 5 if spec.limits else 4  # of the mask's arrays
    visit, slopes, sinks, q_ref, k_ref, v_ref, *initial, y_ref, lse_ref = refs
    initial, (q_side, k_side) = initial[:-count], sides(initial[-count:])
    h = pl.program_id(1)
    q, q_side = q_ref[...], q_side.read()
    slope = slopes[h] if has[0] else None

    def body(masked):
        def block(j, carry):
            top, total, y = carry
            key_slice = pl.ds(j * key, key)
            s, seen = scores(
                spec, q, k_ref[key_slice, :], q_side, k_side.read(key_slice), slope, masked
            )
            if seen is not None:
                s = jnp.where(seen, s, MASKED)
            new_top = jnp.maximum(top, s.max(1))
            weights = jnp.exp(s - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(1)
            new_y = dot(weights.astype(v_ref.dtype), v_ref[key_slice, :], PLAIN)
            return new_top, total, y * shrink[:, None] + new_y

        return block

    rows = q.shape[0]
    start = tuple(ref[...] for ref in initial) or (
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    top, total, y = visits(visit, body, start, cleared=bool(initial))
    sees_any = sees_a_key(top)
    keep = jnp.where(sees_any, 1.0, 0.0)
    if has[1]:
        new_top = jnp.maximum(top, sinks[h])
        keep *= jnp.exp(top - new_top)
        total = total * keep + jnp.exp(sinks[h] - new_top)
        top = new_top
    else:
        total = jnp.where(sees_any, total, 1.0)
    y_ref[...] = (y * (keep / total)[:, None]).astype(y_ref.dtype)
    lse_ref[...] = top + jnp.log(total)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arrays of a call, padded to full blocks; ``query``, ``key``: the block lengths."""

    spec: Spec
    query: int
    key: int
    q_bthc: jax.Array
    k_bskc: jax.Array
    v_bskc: jax.Array
    mask: Mask
    slopes: jax.Array | None
    sinks: jax.Array | None

    @classmethod
    def of(cls, spec, sizes, q_bthc, k_bskc, v_bskc, mask: Mask, slopes, sinks):
        query, key = (_block(sizes[side], a) for side, a in (("query", q_bthc), ("key", k_bskc)))
        q, k, v = whole(q_bthc, query), whole(k_bskc, key), whole(v_bskc, key)
        mask = mask.padded(q.shape[1], k.shape[1])
        return cls(spec, query, key, q, k, v, mask, slopes, sinks)

    @property
    def group(self) -> int:
        return self.q_bthc.shape[2] // self.k_bskc.shape[2]

    def visits(self, by: str) -> jax.Array:
        """For each block of side ``by``, a `Visit` of the other side's: ``[b, blocks, 4]``."""
        mask = self.mask
        q = extremes(mask.q_positions_bt, mask.q_segments_bt, self.query, mask.until_bt)
        k = extremes(mask.k_positions_bs, mask.k_segments_bs, self.key)

        def of_row(q, k):
            q, k = jax.tree.map(lambda a: a[:, None], q), jax.tree.map(lambda a: a[None], k)
            see, clear = may_see(self.spec, q, k), all_see(self.spec, q, k)
            if by == "key":
                see, clear = see.T, clear.T
            return jnp.stack(jax.vmap(Visit.of)(see, clear), -1)

        return jax.vmap(of_row)(q, k).astype(jnp.int32)

    def run(self, kernel, name, by, grid, row_of, arrays, out_shape, out):
        """Run ``kernel`` over ``grid``; each program has one block of side ``by``.

        ``row_of`` maps a program's ids to ``(row of the batch, head of ``by``, its block)``.
        ``arrays``: pairs of a side, ``"q"`` or ``"k"``, and an array of vectors ``[b, length,
        heads, c]`` or of numbers ``[b, heads, length]``; ``out``: sides of the results. Arrays of
        side ``by`` are read in blocks, others in full length: queries of all heads of a group, keys
        of one head.
        """
        size = {"q": self.query, "k": self.key}
        block_side = by[0]

        def spec(side, array):
            numbers = array.ndim == 3
            heads, c = (array.shape[1], None) if numbers else array.shape[2:]
            length = array.shape[2 if numbers else 1]

            def index(*ids):
                row, head, n = row_of(*ids)
                if side != block_side:
                    head, n = (jax.lax.div(head, self.group) if block_side == "q" else head), 0
                return (row, head, n) if numbers else (row, n, head, 0)

            lines = size[side] if side == block_side else length
            group = None if side == block_side or side == "k" else heads // self.k_bskc.shape[2]
            return pl.BlockSpec((None, group, lines) if numbers else (None, lines, group, c), index)

        def mask_spec(side, array):
            def index(*ids):
                row, _, n = row_of(*ids)
                return (row, n if side == block_side else 0)

            return pl.BlockSpec((None, size[side] if side == block_side else array.shape[1]), index)

        def visit(*ids):
            row, _, n = row_of(*ids)
            return (row, n, 0)

        by_head = [
            jnp.zeros((1,), jnp.float32) if a is None else a.astype(jnp.float32)
            for a in (self.slopes, self.sinks)
        ]
        has = (self.slopes is not None, self.sinks is not None)
        return pl.pallas_call(
            named(name, kernel, self.spec, size["k" if block_side == "q" else "q"], has),
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, None, 4), visit),
                *(pl.BlockSpec(a.shape, lambda *ids: (0,)) for a in by_head),
                *(spec(side, a) for side, a in arrays),
                *(mask_spec(side, a) for side, a in self.mask.arrays()),
            ],
            out_specs=[spec(side, a) for side, a in zip(out, out_shape, strict=True)],
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(
                num_warps=4 if max(self.query, self.key) <= 64 else 8, num_stages=2
            ),
            name=name,
        )(self.visits(by), *by_head, *(a for _, a in (*arrays, *self.mask.arrays())))


def _block(size: int, a_blhc: jax.Array) -> int:
    """A power of 2: ``size`` rows of up to 256 bytes, fewer of wider rows, at most the length.

    Rows of float32 count twice: its products have two operands for each (`triton_kernels`).
    """
    _, length, _, c = a_blhc.shape
    width = pl.next_power_of_2(c) * a_blhc.dtype.itemsize
    width *= 2 if a_blhc.dtype == jnp.float32 else 1
    lines = pl.next_power_of_2(size) * 256 // max(width, 256)
    return max(min(lines, pl.next_power_of_2(length)), LEAST)


def pad(a: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    """``a`` with ``axis`` padded to a multiple of ``block``."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % block)
    return jnp.pad(a, widths, constant_values=value) if widths[axis][1] else a


def whole(a_blhc, block: int):
    """``a_blhc`` padded to full blocks, and its channels to a power of 2."""
    return pad(pad(a_blhc, 1, block), 3, max(pl.next_power_of_2(a_blhc.shape[3]), LEAST))


def forward(spec: Spec, sizes: Mapping[str, int], *arrays):
    """``y_bthc, lse_bht``; ``arrays`` as in `reference.attention`."""
    q_bthc, k_bskc, _, _, slopes, _ = arrays
    two_kernels = sizes["kernels"] > 1 and gpu_hopper.supports(q_bthc, k_bskc, slopes)
    if two_kernels:
        sizes = dict(query=gpu_hopper.QUERY, key=gpu_hopper.KEY)
    call = Call.of(spec, sizes, *arrays)
    b, t, h, _ = call.q_bthc.shape
    initial = ()
    if two_kernels:
        visits_bi4 = call.visits("query")
        initial = gpu_hopper.clear_blocks(spec, visits_bi4, call.q_bthc, call.k_bskc, call.v_bskc)
    y_bthc, lse_bht = call.run(
        _forward_kernel,
        "flash_attention",
        "query",
        (t // call.query, h, b),
        lambda i, h, b: (b, h, i),
        (
            ("q", call.q_bthc),
            ("k", call.k_bskc),
            ("k", call.v_bskc),
            *(("q", a) for a in initial),
        ),
        [
            jax.ShapeDtypeStruct(call.q_bthc.shape, call.q_bthc.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ],
        "qq",
    )
    _, t, _, c = arrays[0].shape
    return y_bthc[:, :t, :, :c], lse_bht[..., :t]
