"""The one einsum and the one linear layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.architecture import REMAT
from layers.linear import Linear, fan_in_normal
from layers.weight_gradient import product


@pytest.mark.parametrize(
    ("subscripts", "shape", "bias_shape", "fan_in"),
    [
        ("btd,df->btf", (64, 96), (96,), 64),
        ("btd,dhc->bthc", (64, 4, 24), (4, 24), 64),
        ("bthc,hcd->btd", (8, 16, 96), (96,), 128),
    ],
)
def test_product_bias_and_initial_scale(subscripts, shape, bias_shape, fan_in, rngs):
    axes = tuple("abc"[: len(shape)])
    out_axes = (None,) * len(subscripts.split("->")[1])
    layer = Linear(subscripts, shape, axes, out_axes, rngs=rngs, bias=True)
    weight = np.asarray(layer.weight[...], np.float64)
    assert layer.weight.axes == axes
    assert layer.bias.shape == bias_shape and len(layer.bias.axes) == len(bias_shape)
    assert abs(weight.std() * fan_in**0.5 - 1) < 0.05
    assert np.abs(weight).max() < 2.3 / fan_in**0.5  # cut at two (uncorrected) σ
    sizes = dict(zip(subscripts.split(",")[1].split("->")[0], shape, strict=True))
    letters = subscripts.split(",")[0]
    x = np.random.default_rng(0).normal(size=[sizes.get(a, 2) for a in letters])
    want = np.einsum(subscripts, x, weight)
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), want, atol=3e-6)
    layer.bias.set_value(jnp.ones(bias_shape))
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), want + 1, atol=3e-6)


@pytest.mark.parametrize(
    ("subscripts", "sizes"),
    [
        ("btd,df->btf", dict(b=2, t=3, d=4, f=9)),
        ("btf,fd->btd", dict(b=2, t=3, d=4, f=9)),
        ("btd,vd->btv", dict(b=2, t=3, d=4, v=9)),
        ("btd,vd->btv", dict(b=2, t=3, d=9, v=4)),
        ("btd,dhc->bthc", dict(b=2, t=3, d=4, h=2, c=5)),
        ("bthc,hcd->btd", dict(b=2, t=3, d=4, h=2, c=5)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_numpy_whichever_factor_is_turned(subscripts, sizes, dtype):
    rng = np.random.default_rng(0)
    inputs, output = subscripts.split("->")
    left, right = inputs.split(",")
    x, weight, dy = (rng.normal(size=[sizes[a] for a in each]) for each in (left, right, output))
    # what is multiplied is rounded first, so that only sums differ
    x, weight, dy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, weight, dy))

    def loss(x, weight):
        y = product(
            subscripts, x.astype(dtype), weight.astype(dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        assert y.dtype == jnp.float32
        return jnp.sum(y * dy.astype(np.float32))

    run = jax.jit(jax.grad(loss, (0, 1)))
    got = run(x.astype(np.float32), weight.astype(np.float32))
    wants = (
        np.einsum(f"{output},{right}->{left}", dy, weight),
        np.einsum(f"{left},{output}->{right}", x, dy),
    )
    for a, want in zip(got, wants, strict=True):
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(a, want, atol=tolerance * np.abs(want).max())


def test_a_policy_sees_the_products(rngs):
    """What ``remat="dots"`` keeps is not multiplied again."""
    axes = (None,) * 2, (None,) * 3
    first, second = (Linear("btd,df->btf", (4, 4), *axes, rngs=rngs) for _ in range(2))

    def multiplied(remat):
        def loss(layers, x):
            first, second = layers
            return jnp.sum(jnp.sin(second(jnp.sin(first(x)))))

        loss = jax.checkpoint(loss, policy=REMAT[remat])
        return products(jax.make_jaxpr(jax.grad(loss))((first, second), jnp.ones((1, 2, 4))).jaxpr)

    def products(jaxpr):
        """Those that are evaluated, also in what its equations call."""
        count = 0
        for equation in jaxpr.eqns:
            count += equation.primitive.name == "dot_general"
            called = [getattr(value, "jaxpr", value) for value in equation.params.values()]
            count += sum(products(inner) for inner in called if hasattr(inner, "eqns"))
        return count

    # both forward and two gradients each; again: both forward
    assert (multiplied("dots"), multiplied("full")) == (6, 8)


def test_gradients_of_gradients(rngs):
    layer = Linear("btd,df->btf", (4, 3), (None,) * 2, (None,) * 3, rngs=rngs)
    x = jnp.ones((1, 2, 4))

    def squares(layer):
        return jnp.sum(jnp.square(layer(x)))

    def length(layer):
        return jnp.sum(jnp.square(jax.grad(squares)(layer).weight[...]))

    weight = np.asarray(layer.weight[...], np.float64)
    gram = np.full((4, 4), 2.0)
    # the gradient is 2 G w, its square's 8 G² w
    want = 8 * gram @ gram @ weight
    np.testing.assert_allclose(jax.grad(length)(layer).weight[...], want, rtol=1e-5)


def test_dtypes_of_parameters_compute_and_result_are_separate(rngs):
    layer = Linear(
        "btd,df->btf", (4, 6), (None, None), (None,) * 3, rngs=rngs, bias=True,
        dtype=jnp.bfloat16, out_dtype=jnp.float32,
    )  # fmt: skip
    x = jnp.ones((1, 2, 4))
    assert layer.weight[...].dtype == layer.bias[...].dtype == jnp.float32
    y = layer(x)
    assert y.dtype == jnp.float32
    rounded = layer.weight[...].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(y, x @ rounded, rtol=1e-6)


def test_fan_in_normal_keeps_its_variance():
    w = fan_in_normal(2.0)(jax.random.key(0), (100, 1000))
    assert abs(float(w.std()) - 0.2) < 0.002
