"""Hand-written passes in every mode of differentiation, against JAX's own rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.weight_gradient import product
from pallas_kernels.derivatives import differentiable
from pallas_kernels.flash_attention import flash_attention

X = jax.random.normal(jax.random.key(0), (3, 4))
DX = jax.random.normal(jax.random.key(1), (3, 4))
CALLS = []


def plain(x, ids, scale):
    return {"y": jnp.sin(x) * scale, "z": x[ids]}


def forward(x, ids, scale):
    CALLS.append("forward")
    return plain(x, ids, scale), (jnp.cos(x), jnp.argmax(x))


def backward(arguments, saved, cotangents):
    CALLS.append("backward")
    x, ids, scale = arguments
    dx = saved[0] * scale * cotangents["y"] + jnp.zeros_like(x).at[ids].add(cotangents["z"])
    return dx, None, jnp.sum(jnp.sin(x) * cotangents["y"])


written = differentiable(forward, backward, plain)


def loss(function):
    def of(x, scale=2.0):
        found = function(x, jnp.array([2, 0]), jnp.asarray(scale))
        return jnp.sum(found["y"] ** 3) + jnp.sum(found["z"] ** 2)

    return of


MODES = {
    "value": lambda f: f(X),
    "grad": lambda f: jax.grad(f, (0, 1))(X, 1.5),
    "jvp": lambda f: jax.jvp(f, (X, 1.5), (DX, 0.3)),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "hessian": lambda f: jax.hessian(f)(X),
    "reverse twice": lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(X),
    "vmapped grad": lambda f: jax.vmap(jax.grad(f), (0, None))(jnp.stack((X, DX)), 1.5),
    "grad of vmap": lambda f: jax.grad(
        lambda x: jnp.sum(jax.vmap(f, (None, 0))(x, jnp.arange(3.0)))
    )(X),
    "scan and remat": lambda f: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (jax.checkpoint(f)(c * x), None), 1.0, length=2)[0]
    )(X),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_jax_s_own(mode):
    want = jax.jit(lambda: MODES[mode](loss(plain)))()
    got = jax.jit(lambda: MODES[mode](loss(written)))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_reverse_mode_takes_the_written_passes():
    CALLS.clear()
    jax.grad(loss(written))(X)
    assert CALLS == ["forward", "backward"]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_attention_in_every_mode(implementation):
    """Of what has a reference of its own: queries, keys, values and sinks."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, n, 4)) for i, n in enumerate((4, 2, 2)))

    def f(x, implementation=implementation):
        sinks = x[0, 0, :, 0]
        y, lse = flash_attention(
            q * x, k * x[:, :, :2], v, sinks_h=sinks, return_lse=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(lse**2)

    x = jax.random.normal(jax.random.key(9), q.shape)
    for mode in (jax.jacfwd, jax.jacrev, lambda f: jax.jacfwd(jax.grad(f)), jax.hessian):
        want = jax.jit(mode(lambda x: f(x, "reference")))(x)
        np.testing.assert_allclose(jax.jit(mode(f))(x), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("subscripts", ["btd,dhc->bthc", "bthc,hcd->btd", "btd,vd->btv"])
def test_products_in_every_mode(subscripts):
    shapes = {"b": 2, "t": 3, "d": 4, "h": 2, "c": 3, "v": 7}
    left, right = subscripts.split("->")[0].split(",")
    x, w = (
        jax.random.normal(jax.random.key(i), [shapes[a] for a in side])
        for i, side in enumerate((left, right))
    )

    def f(function):
        return lambda x, w: jnp.sum(jnp.sin(function(x, w)))

    ours = f(lambda x, w: product(subscripts, x, w, preferred_element_type=None))
    theirs = f(lambda x, w: jnp.einsum(subscripts, x, w))
    for mode in (jax.grad, jax.jacfwd, jax.hessian):
        got, want = (jax.jit(mode(g, (0, 1)))(x, w) for g in (ours, theirs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
