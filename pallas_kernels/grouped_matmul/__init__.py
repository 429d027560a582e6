"""Grouped matmul: the product of each row with its expert's weights, for rows sorted by expert.

    y[i] = x[i] @ weights[e]    for  sum(sizes[:e]) <= i < sum(sizes[:e + 1]),  else 0
    dx[i] = dy[i] @ weights[e].T
    dweights[e] = sum over the rows i of group e of outer(x[i], dy[i])

Mixtures of experts without capacity use it (MegaBlocks, Gale et al. 2022, 2211.15841, section 3, as
a block-sparse product; Mixtral, Jiang et al. 2024, 2401.04088, section 2.1): no row is dropped and
none is padded. A group may be empty; its gradient is exactly 0.

A matrix unit requires blocks of rows with the same weights, but a group may end at any row. So the
kernels compute a list of visits (block of rows, group), in order. A block that several groups share
is visited once for each of them; each visit multiplies all rows of the block and stores those of
its group (`visits`). With blocks of R rows there are at most ``m / R + e`` visits, for any sizes;
nothing depends on the largest group.

Implementations, and what each has in fast memory:

- ``reference``: one dense product for each expert over all rows. The equation.
- ``xla``: XLA's ragged products; on a CPU, where those are dense, a loop over groups and chunks of
  rows that copies the weights of one group at a time. See `xla`.
- ``tpu``: a block of y is summed in VMEM over blocks of d; the weights of a group stay there for
  all its blocks if d is one block. The gradient of the weights is summed in VMEM over the blocks of
  a group. float32 and bfloat16. See `tpu`.
- ``gpu``: a block of y, or of the gradient of the weights, is summed in registers. Blocks begin
  where groups do, so none is shared. float32, bfloat16 and float16. See `gpu`.

Every backward pass is deterministic: each gradient is summed by one program in one order.

Limits: the sizes must be ≥ 0 and their sum at most m; this is not checked, because they are values
of an array. Forward mode and second derivatives are those of the reference
(`pallas_kernels.derivatives`). The kernels have been compiled for TPUs and for an H100 and run
interpreted; they have not run on a TPU or a GPU yet.
"""

import functools
from collections.abc import Mapping

import jax

from pallas_kernels.blocks import block_sizes
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import check, check_array, choose, per_platform
from pallas_kernels.grouped_matmul import gpu, reference, tpu, xla

OP = "grouped_matmul"

PASSES = {
    "xla": {"forward": xla.forward, "backward": xla.backward},
    "tpu": {"forward": tpu.forward, "backward": tpu.backward},
    "gpu": {"forward": gpu.forward, "backward": gpu.backward},
}
# implementation → the platform whose block sizes (`pallas_kernels.blocks`) it has
PLATFORMS = {"xla": "cpu", "tpu": "tpu", "gpu": "gpu"}


def grouped_matmul(
    x_md: jax.Array,
    weights_edf: jax.Array,
    group_sizes_e: jax.Array,
    *,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> jax.Array:
    """The product of each group of rows with the group's matrix.

    Args:
      x_md: rows sorted by group; rows after the last group give 0 and have gradient 0, also if
        they are NaN.
      weights_edf: a matrix for each group, of x's dtype.
      group_sizes_e: integers, the number of rows in each group.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes that override `pallas_kernels.blocks`: ``rows`` of a block for every
        implementation; for a named kernel also ``inner`` (of d, or of f for dx) and ``columns``.

    Returns:
      y_mf in x's dtype, accumulated in float32.

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    check(x_md.ndim == 2, "x_md.shape", x_md.shape, "must be (m, d)")
    check_array("x_md", x_md, x_md.shape)
    check(weights_edf.ndim == 3, "weights_edf.shape", weights_edf.shape, "must be (e, d, f)")
    e, _, f = weights_edf.shape
    check_array("weights_edf", weights_edf, (e, x_md.shape[1], f))
    allowed = f"must be x_md's, {x_md.dtype}"
    check(weights_edf.dtype == x_md.dtype, "weights_edf.dtype", str(weights_edf.dtype), allowed)
    check_array("group_sizes_e", group_sizes_e, (e,), "integer")
    refusals = {
        "xla": None,
        "tpu": tpu.refusal(x_md, weights_edf),
        "gpu": gpu.refusal(x_md, weights_edf),
    }
    chosen = choose(OP, implementation, refusals)
    if chosen == ["reference"]:
        return reference.grouped_matmul(x_md, weights_edf, group_sizes_e)
    sizes = tuple(
        (name, tuple(block_sizes(OP, PLATFORMS[name], blocks).items())) for name in chosen
    )
    return _op(sizes)(x_md, weights_edf, group_sizes_e)


@functools.lru_cache(maxsize=256)
def _op(sizes):
    return differentiable(
        functools.partial(_forward, sizes),
        functools.partial(_backward, sizes),
        reference.grouped_matmul,
    )


def _run(sizes, name, *arrays):
    """The pass ``name`` of an implementation in ``sizes``, chosen by platform."""
    table = {n: functools.partial(PASSES[n][name], dict(sizes_of_n)) for n, sizes_of_n in sizes}
    return per_platform(list(table), table, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _forward(sizes, *arrays):
    return _run(sizes, "forward", *arrays), None


@functools.partial(jax.jit, static_argnums=0)
def _backward(sizes, arrays, _, dy_mf):
    dx_md, dweights_edf = _run(sizes, "backward", *arrays, dy_mf)
    return dx_md, dweights_edf, None
