"""The storage of vectors against float64 NumPy, and against the bytes of codes written by hand."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.stored import DTYPES, Stored

CODES = ("int8", "int4", "float8_e4m3fn")


def vectors(shape=(3, 5, 16)):
    rng = np.random.default_rng(0)
    # vectors of very different lengths, each of which has its own scale
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))).astype(
        np.float32
    )


def rounded(x, dtype):
    """``x`` after its codes, from the equations in float64."""
    x = x.astype(np.float64)
    if dtype == "int4":
        least = x.min(-1, keepdims=True)
        scale = (x.max(-1, keepdims=True) - least) / 15
        return least + scale * np.round((x - least) / scale)
    scale = np.abs(x).max(-1, keepdims=True) / {"int8": 127, "float8_e4m3fn": 448}[dtype]
    codes = x / scale
    if dtype == "int8":
        return scale * np.round(codes)
    return scale * codes.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_the_equation(dtype):
    x = vectors()
    stored = Stored.of(jnp.asarray(x), dtype)
    assert stored.channels == 16 and stored.dtype == dtype
    longest = np.abs(x).max(-1, keepdims=True)
    difference = np.abs(np.asarray(stored.load(), np.float64) - rounded(x, dtype)) / longest
    # float32's rounding may move a code that is at the middle of two
    assert np.mean(difference > 1e-5) < 0.02
    bound = {"int8": 0.5 / 127, "int4": 1 / 15, "float8_e4m3fn": 2.0**-4}[dtype]
    error = np.abs(np.asarray(stored.load(), np.float64) - x) / longest
    assert bound / 4 < error.max() <= bound * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in CODES])
def test_floating_point_is_stored_as_it_is(dtype):
    x = jnp.asarray(vectors(), dtype)
    stored = Stored.of(x, dtype)
    assert stored.scale is None and stored.minimum is None and stored.codes.dtype == dtype
    np.testing.assert_array_equal(stored.load(dtype), x)


def test_bytes_of_int4():
    """Channel ``i`` is in the low half of byte ``i``, channel ``i + c/2`` in its high half."""
    x = jnp.asarray([[0.0, 1.0, 2.0, 15.0, 7.0, 8.0]])
    stored = Stored.of(x, "int4")
    assert stored.codes.tolist() == [[0 | 15 << 4, 1 | 7 << 4, 2 | 8 << 4]]
    assert stored.codes.dtype == jnp.uint8 and stored.channels == 6
    np.testing.assert_array_equal(stored.load(), x)
    assert stored.codes.nbytes * 2 == x.size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.3, -5.0])
def test_constant_vectors(dtype, value):
    x = jnp.full((2, 4), value, jnp.float32)
    np.testing.assert_allclose(Stored.of(x, dtype).load(), x, rtol=5e-3)
    if value == 0:
        np.testing.assert_array_equal(Stored.of(x, dtype).load(), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_is_zeros_of_the_same_types(dtype):
    empty, of = Stored.empty((3, 2, 8), dtype), Stored.of(jnp.zeros((3, 2, 8)), dtype)
    assert jax.tree.structure(empty) == jax.tree.structure(of)
    for a, b in zip(jax.tree.leaves(empty), jax.tree.leaves(of), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(empty.load(), 0)
    none = Stored.of(jnp.zeros((3, 0)), dtype)
    assert none.channels == 0 and none.load().shape == (3, 0)


@pytest.mark.parametrize("dtype", CODES)
def test_a_vector_does_not_depend_on_others(dtype):
    x = vectors((4, 8))
    whole, one = (Stored.of(jnp.asarray(a), dtype).load() for a in (x, x[2:3]))
    np.testing.assert_array_equal(whole[2:3], one)


def test_what_is_refused():
    for make in (lambda d: Stored.empty((2, 4), d), lambda d: Stored.of(jnp.zeros((2, 4)), d)):
        with pytest.raises(ValueError, match=re.escape("did you mean 'int8'?")):
            make("int9")
    for make in (Stored.empty, lambda shape, dtype: Stored.of(jnp.zeros(shape), dtype)):
        with pytest.raises(ValueError, match="channels=3: must be even for int4"):
            make((2, 3), "int4")
