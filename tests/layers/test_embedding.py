"""Embedding lookups, tied logits, sinusoids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.embedding import Embedding, sinusoidal


def test_looks_up_rows_and_multiplies_by_them(rngs):
    layer = Embedding(7, 4, rngs=rngs, std=0.5)
    table = np.asarray(layer.table[...])
    ids = np.array([[0, 6], [3, 3]])
    np.testing.assert_array_equal(layer(ids), table[ids])
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(layer.logits(x), x @ table.T, atol=1e-6)


def test_gradient_adds_up_where_an_id_repeats(rngs):
    layer = Embedding(5, 3, rngs=rngs, std=0.5)
    gradient = jax.grad(lambda layer: layer(np.array([[1, 4, 1]])).sum())(layer)
    want = np.zeros((5, 3))
    want[1], want[4] = 2, 1
    np.testing.assert_array_equal(gradient.table[...], want)


@pytest.mark.parametrize("bad", [7, 1000, -1, -7])
def test_an_id_out_of_range_is_nan_not_another_row(rngs, bad):
    layer = Embedding(7, 4, rngs=rngs, std=0.5)
    y = np.asarray(layer(np.array([[0, bad]])))
    assert np.all(np.isfinite(y[0, 0])) and np.all(np.isnan(y[0, 1]))


def test_bfloat16_compute_keeps_float32_table_and_logits(rngs):
    layer = Embedding(7, 4, rngs=rngs, std=0.5, dtype=jnp.bfloat16)
    assert layer.table[...].dtype == jnp.float32
    x = layer(np.array([[1]]))
    assert x.dtype == jnp.bfloat16 and layer.logits(x).dtype == jnp.float32


def test_sinusoids_match_float64():
    positions = np.array([[0, 1, 2], [100, 1000, 4000]])
    angles = positions[..., None] / 10_000.0 ** (np.arange(0, 16, 2) / 16)
    got = sinusoidal(jnp.asarray(positions), 16)
    np.testing.assert_allclose(got[..., 0::2], np.sin(angles), atol=1e-3)
    np.testing.assert_allclose(got[..., 1::2], np.cos(angles), atol=1e-3)
