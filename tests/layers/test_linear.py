"""The one einsum and the one linear layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.linear import Linear, fan_in_normal


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
    layer = Linear(subscripts, shape, axes, (None,) * 3, rngs=rngs, bias=True)
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
