"""Grouped matmul: rows sorted by expert, each multiplied by its expert's weights.

    y[i] = x[i] @ weights[e]    for  sum(sizes[:e]) <= i < sum(sizes[:e + 1]),  else 0
    dx[i] = dy[i] @ weights[e].T
    dweights[e] = sum over the rows i of group e of outer(x[i], dy[i])

It is the product of dropless mixtures of experts (MegaBlocks, Gale et al. 2022, 2211.15841, section
3, where it is a block-sparse product; Mixtral, Jiang et al. 2024, 2401.04088, section 2.1, runs on
it): no capacity, so no row is dropped and none is padded. A group may be empty; its gradient is
exactly 0.

A matrix unit wants tiles of rows that share their weights, and groups end anywhere. So the kernels
go through visits (tile of rows, group), in order: a tile that several groups share is visited once
for each of them, multiplied whole, and each stores its own rows (`visits`). With tiles of R rows
that is at most ``m / R + e`` visits, whatever the sizes; nothing depends on the largest group.

Implementations, and what each keeps in fast memory:

- ``reference``: one dense product an expert over all rows. The equation.
- ``xla``: XLA's ragged products; on a CPU, where those are dense, a loop over groups and chunks of
  rows that copies one group's weights at a time. See `xla`.
- ``tpu``: a tile of y is summed in VMEM over blocks of d; a group's weights stay there over its
  tiles if d is one block. The gradient of the weights is summed in VMEM over the tiles of a group.
  float32 and bfloat16. See `tpu`.
- ``gpu``: a tile of y, or of the gradient of the weights, is summed in registers. Tiles begin where
  groups do, so none is shared. float32, bfloat16 and float16. See `gpu`.

Every backward pass is deterministic: each gradient is summed by one program in one order.

Limits: the sizes must be non-negative and add up to at most m: they are values, so no check is made
of them. Forward mode and second derivatives are the reference's (`pallas_kernels.derivatives`). The
kernels have been compiled for TPUs and for an H100 and run interpreted; not run on a TPU or a GPU
yet.
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
# whose row of `pallas_kernels.blocks` holds
PLATFORMS = {"xla": "cpu", "tpu": "tpu", "gpu": "gpu"}


def grouped_matmul(
    x_md: jax.Array,
    weights_edf: jax.Array,
    group_sizes_e: jax.Array,
    *,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> jax.Array:
    """Multiply each group of rows by its own matrix.

    Args:
      x_md: rows sorted by group; those past the last group give 0 and get gradient 0, whatever
        they hold.
      weights_edf: a matrix a group, of x's dtype.
      group_sizes_e: integers, the rows of each group.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes that override `pallas_kernels.blocks`: ``rows`` of a tile for every
        implementation; for a named kernel also ``inner`` (of d, or of f for dx) and ``columns``.

    Returns:
      y_mf in x's dtype, accumulated in float32.

    Raises:
      ValueError: names the argument that has another shape, dtype or range than said here, or the
        implementation that cannot serve, with the reason.
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
    """The pass ``name`` of one of the implementations that ``sizes`` names."""
    table = {n: functools.partial(PASSES[n][name], dict(own)) for n, own in sizes}
    return per_platform(list(table), table, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _forward(sizes, *arrays):
    return _run(sizes, "forward", *arrays), None


@functools.partial(jax.jit, static_argnums=0)
def _backward(sizes, arrays, _, dy_mf):
    dx_md, dweights_edf = _run(sizes, "backward", *arrays, dy_mf)
    return dx_md, dweights_edf, None
