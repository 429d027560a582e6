"""Common parts of the kernels that Triton compiles for NVIDIA GPUs: names and products.

Tensor cores multiply float32 as TF32, which has 10 of its 23 mantissa bits. A float32 is the sum of
``high``, its first 10 bits, and ``low``, the remainder. So a product is
``high · high + high · low + low · high``, with a relative error of 2^−21 (XLA's TF32_TF32_F32_X3;
Ootomo & Yokota 2022, 2203.03341). Tensor cores do not support full float32 products; Triton would
unroll them number by number, over minutes.
"""

import jax
import jax.numpy as jnp

# contractions: of both first axes, of the plain product, of both last axes
FIRST, PLAIN, LAST = ((((a,), (b,)), ((), ())) for a, b in ((0, 0), (1, 0), (1, 1)))


def named(name: str, kernel, *arguments):
    """``kernel`` with its static ``arguments``; profiles show it as ``name``."""

    def run(*refs):
        return kernel(*arguments, *refs)

    run.__name__ = run.__qualname__ = name
    return run


def dot(a, b, contract):
    """The product of two matrices of the same dtype, accumulated in float32."""
    if a.dtype != jnp.float32:
        return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
    (a_high, a_low), (b_high, b_low) = _parts(a), _parts(b)
    # the smallest terms first
    total = jax.lax.dot_general(a_low, b_high, contract)
    total += jax.lax.dot_general(a_high, b_low, contract)
    return total + jax.lax.dot_general(a_high, b_high, contract)


def _parts(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(~0x1FFF)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
