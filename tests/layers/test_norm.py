"""Norms against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.norm import Norm, layer_norm, rms_norm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5, 8)).astype(np.float32) * 3 + 1
SCALE, BIAS, COTANGENT = (RNG.normal(size=s).astype(np.float32) for s in (8, 8, X.shape))


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "layer_norm without bias"])
def test_value_and_gradient_match_torch(kind):
    torch = pytest.importorskip("torch")
    x, scale, bias = (torch.tensor(a.astype(np.float64), requires_grad=True)
                      for a in (X, SCALE, BIAS))  # fmt: skip
    functional = torch.nn.functional
    if kind == "rms_norm":
        inputs, want = (X, SCALE), functional.rms_norm(x, (8,), scale, 1e-5)
        y, back = jax.vjp(lambda *a: rms_norm(*a, eps=1e-5), *inputs)
    else:
        inputs = (X, SCALE, BIAS) if kind == "layer_norm" else (X, SCALE)
        want = functional.layer_norm(x, (8,), scale, bias if len(inputs) == 3 else None, 1e-5)
        y, back = jax.vjp(lambda *a: layer_norm(*a, eps=1e-5), *inputs)
    want.backward(torch.tensor(COTANGENT.astype(np.float64)))
    np.testing.assert_allclose(y, want.detach().numpy(), atol=5e-6)
    for got, tensor in zip(back(COTANGENT), (x, scale, bias), strict=False):
        np.testing.assert_allclose(got, tensor.grad.numpy(), atol=3e-5)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_bfloat16_is_normalised_in_float32(kind):
    norm = Norm(kind, 8, eps=1e-6)
    x = jnp.asarray(X * 100, jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_zeros_are_finite_in_value_and_gradient(kind):
    norm = Norm(kind, 8, eps=1e-6)
    y, back = jax.vjp(norm, jnp.zeros((1, 8)))
    assert not np.any(y)
    assert np.all(np.isfinite(back(jnp.ones_like(y))[0]))


def test_a_scale_held_as_its_difference_from_1_and_a_norm_over_two_axes():
    one_p, plain = (Norm(kind, 8, eps=1e-6) for kind in ("rmsnorm_1p", "rmsnorm"))
    assert not np.any(one_p.scale[...])
    np.testing.assert_array_equal(one_p(X), plain(X))
    scale = np.resize(SCALE, (5, 8))
    flat = rms_norm(X.reshape(3, 40), scale.reshape(40), eps=1e-5)
    across = rms_norm(X, scale, eps=1e-5, dims=2)
    np.testing.assert_allclose(across, flat.reshape(X.shape), rtol=1e-6)
    across = Norm("rmsnorm", (5, 8), eps=1e-5, axes=("heads", "head_dim"))
    across.scale[...] = jnp.asarray(scale)
    np.testing.assert_allclose(across(X), flat.reshape(X.shape), rtol=1e-6)
    flat = layer_norm(X.reshape(3, 40), scale.reshape(40), scale.reshape(40), eps=1e-5)
    across = layer_norm(X, scale, scale, eps=1e-5, dims=2)
    np.testing.assert_allclose(across, flat.reshape(X.shape), rtol=1e-5, atol=1e-6)


def test_weights_begin_as_the_identity_and_bias_is_optional():
    assert Norm("layernorm", 8, eps=1e-6).bias is None
    norm = Norm("layernorm", 8, eps=1e-6, bias=True, param_dtype=jnp.bfloat16)
    assert norm.scale[...].dtype == norm.bias[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm.scale[...], 1)
    np.testing.assert_array_equal(norm.bias[...], 0)
