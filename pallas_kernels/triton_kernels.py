"""What kernels for NVIDIA GPUs that Triton compiles share: their names, and products.

Tensor cores take float32 as TF32, which has 10 of its 23 bits. A float32 is the sum of its first 10
bits and the rest, so a product is ``high · high + high · low + low · high``, right to 2^−21 (XLA's
own TF32_TF32_F32_X3; Ootomo & Yokota 2022, 2203.03341). The alternative, float32 multiplied as
such, is not done by tensor cores, and Triton writes it out, number by number, over minutes.
"""

import jax
import jax.numpy as jnp

# contraction of the first axes, of the plain product, and with a transposed right side
FIRST, PLAIN, LAST = ((((a,), (b,)), ((), ())) for a, b in ((0, 0), (1, 0), (1, 1)))


def named(name: str, kernel, *arguments):
    """``kernel`` of its static ``arguments``, under the name that a profile will show."""

    def run(*refs):
        return kernel(*arguments, *refs)

    run.__name__ = run.__qualname__ = name
    return run


def dot(a, b, contract):
    """The product of two matrices of one dtype, summed in float32."""
    if a.dtype != jnp.float32:
        return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
    (a_high, a_low), (b_high, b_low) = _parts(a), _parts(b)
    # the least first
    total = jax.lax.dot_general(a_low, b_high, contract)
    total += jax.lax.dot_general(a_high, b_low, contract)
    return total + jax.lax.dot_general(a_high, b_high, contract)


def _parts(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(~0x1FFF)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
