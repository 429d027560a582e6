"""Products with a weight whose gradient is fast on XLA:CPU.

XLA:CPU contracts the last axis of the left factor only. So one factor of a weight's gradient, ``x``
or the cotangent, is transposed in memory. What is fused into this factor (activation functions,
norms, gates and convolutions, or their backward passes) is computed once more, with strided access.
JAX's rule always transposes the cotangent, which makes a training step 5 to 25% slower. Here the
smaller factor is transposed.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.derivatives import linear


def product(
    subscripts: str,
    x: jax.Array,
    weight: jax.Array,
    *,
    preferred_element_type: jnp.dtype | None,
) -> jax.Array:
    """``jnp.einsum(subscripts, x, weight)`` on one device."""
    # jnp.einsum contracts letters in alphabetical order; in memory order nothing is transposed
    letters = dict.fromkeys(a for a in subscripts if a.isalpha())
    renamed = dict(zip(letters, "abcdefghij", strict=False))
    subscripts = "".join(renamed.get(a, a) for a in subscripts)
    return _op(subscripts, preferred_element_type)(x, weight)


@functools.lru_cache(maxsize=256)
def _op(subscripts: str, preferred_element_type: jnp.dtype | None):
    inputs, output = subscripts.split("->")
    left, right = inputs.split(",")

    def einsum(x, weight):
        return jnp.einsum(subscripts, x, weight, preferred_element_type=preferred_element_type)

    def push(factors, tangents):
        (x, weight), (dx, dw) = factors, tangents
        return einsum(dx, weight) + einsum(x, dw)

    def pull(factors, dy):
        x, weight = factors
        dx = jnp.einsum(f"{output},{right}->{left}", dy, weight, preferred_element_type=x.dtype)
        first, second, firsts, seconds = x, dy, left, output
        if x.size > dy.size:
            first, second, firsts, seconds = dy, x, output, left
        # with another order of the output, the right factor would become the left one
        order = "".join(dict.fromkeys(a for a in firsts + seconds if a in right))
        dw = jnp.einsum(
            f"{firsts},{seconds}->{order}", first, second, preferred_element_type=weight.dtype
        )
        return dx, jnp.einsum(f"{order}->{right}", dw)

    run = jax.custom_jvp(einsum)

    @run.defjvp
    def derivative(factors, tangents):
        # the primal is a plain product, which policies of `jax.checkpoint` recognise
        return einsum(*factors), linear(push, pull, factors, tangents)

    return run
