"""Grouped matmul: rows sorted by expert, each multiplied by its expert's weights.

    y[i] = x[i] @ weights[e]    for  sum(sizes[:e]) <= i < sum(sizes[:e + 1]),  else 0
    dx[i] = dy[i] @ weights[e].T
    dweights[e] = sum over the rows i of group e of outer(x[i], dy[i])

It is the product of dropless mixtures of experts (MegaBlocks, Gale et al. 2022, section 3): no
capacity, so no row is dropped and none is padded. A group may be empty; its gradient is exactly 0.

Limits: ``reference`` and ``xla`` alone; a named ``tpu`` or ``gpu`` is refused. The sizes must be
non-negative and add up to at most m: they are values, so no check is made of them.
"""

import jax
import numpy as np

from pallas_kernels.dispatch import check, check_array, choose
from pallas_kernels.grouped_matmul import reference, xla

_REFUSALS = {
    "xla": None,
    "tpu": "there is no TPU kernel of it",
    "gpu": "there is no GPU kernel of it",
}


def grouped_matmul(
    x_md: jax.Array,
    weights_edf: jax.Array,
    group_sizes_e: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply each group of rows by its own matrix.

    Args:
      x_md: rows sorted by group; those past the last group give 0 and get gradient 0.
      weights_edf: a matrix a group, of x's dtype.
      group_sizes_e: int32, the rows of each group.
      implementation: ``"reference"``, ``"xla"`` or None.

    Returns:
      y_mf in x's dtype, accumulated in float32.

    Raises:
      ValueError: names the argument that cannot be.
    """
    check(x_md.ndim == 2, "x_md.shape", x_md.shape, "must be (m, d)")
    check_array("x_md", x_md, x_md.shape)
    check(weights_edf.ndim == 3, "weights_edf.shape", weights_edf.shape, "must be (e, d, f)")
    e, _, f = weights_edf.shape
    check_array("weights_edf", weights_edf, (e, x_md.shape[1], f))
    allowed = f"must be x_md's, {x_md.dtype}"
    check(weights_edf.dtype == x_md.dtype, "weights_edf.dtype", str(weights_edf.dtype), allowed)
    check_array("group_sizes_e", group_sizes_e, (e,), "integer")
    (chosen,) = choose("grouped_matmul", implementation, _REFUSALS)
    if chosen == "reference":
        return reference.grouped_matmul(x_md, weights_edf, group_sizes_e)
    return _grouped_matmul(x_md, weights_edf, group_sizes_e)


@jax.custom_vjp
def _grouped_matmul(x_md, weights_edf, group_sizes_e):
    return xla.forward(x_md, weights_edf, group_sizes_e)


def _forward(x_md, weights_edf, group_sizes_e):
    return xla.forward(x_md, weights_edf, group_sizes_e), (x_md, weights_edf, group_sizes_e)


def _backward(residuals, dy_mf):
    x_md, weights_edf, group_sizes_e = residuals
    dx_md, dweights_edf = xla.backward(x_md, weights_edf, group_sizes_e, dy_mf)
    # integers have no tangent: JAX wants zeros of float0
    return dx_md, dweights_edf, np.zeros(group_sizes_e.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)
