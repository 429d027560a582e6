"""Writes of new tokens into pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import update_pages
from pallas_kernels.stored import DTYPES, Stored
from tests.pallas_kernels.conftest import interpreted
from tests.pallas_kernels.test_paged_attention import TILE


def pool(dtype, kv_heads=2, page=4, channels=6, pages=9):
    """An empty pool without a token; every vector is something that must not be seen."""
    whole = Stored.empty((pages, kv_heads, page, channels), dtype)

    def poison(a):
        return jnp.full_like(a, jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 77)

    keys, values = (jax.tree.map(poison, whole) for _ in range(2))
    return keys, values, *(jnp.full((pages, page), value, jnp.int32) for value in (-1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_writes_each_token_into_its_slot(dtype):
    """Two calls, the second with padding between tokens, against a loop over tokens."""
    rng = np.random.default_rng(0)
    keys, values, positions, segments = pool(dtype)
    table = jnp.asarray([[3, 8, -1], [5, 0, 7], [2, -1, -1]], jnp.int32)
    written = jnp.zeros(3, jnp.int32)
    want = [np.asarray(a).copy() for a in jax.tree.leaves((keys, values, positions, segments))]
    count = [0, 0, 0]
    for at in (
        [[0, 1, 2, 3, 4], [7, 8, 9, -1, -1], [-1] * 5],
        [[-1, 5, -1, 6, -1], [10, -1, 11, 12, -1], [0, 1, 2, 3, 4]],  # the last has no page
    ):
        at = np.asarray(at, np.int32)
        k, v = (jnp.asarray(rng.normal(size=(*at.shape, 2, 6)), jnp.float32) for _ in range(2))
        new = (Stored.of(k, dtype), Stored.of(v, dtype), at, at + 50)
        for row, i in np.ndindex(*at.shape):
            page = table[row, count[row] // 4]
            if at[row, i] >= 0:
                for old, one in zip(want, jax.tree.leaves(new), strict=True):
                    if page >= 0:
                        old[page, ..., count[row] % 4, *[slice(None)] * (one.ndim - 3)] = (
                            np.asarray(one)[row, i]
                        )
                count[row] += 1
        *arrays, written = update_pages(
            keys, values, positions, segments, k, v, at, jnp.asarray(at + 50), table, written
        )
        keys, values, positions, segments = arrays
        for got, expected in zip(jax.tree.leaves(arrays), want, strict=True):
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), expected.view(np.uint8))
    assert written.tolist() == count


@pytest.mark.parametrize(
    "dtype",
    [d if d in ("bfloat16", "int4") else pytest.param(d, marks=pytest.mark.slow) for d in TILE],
)
def test_the_tpu_update_writes_the_same_bytes(dtype):
    """Rows that begin inside a tile, padding between tokens, and a row without pages."""
    rng, page = np.random.default_rng(0), 2 * TILE[dtype]
    keys, values, positions, segments = pool(dtype, page=page)
    table = jnp.asarray([[3, 8, -1], [5, 0, 7], [-1, -1, -1]], jnp.int32)
    at = jnp.asarray(np.where(rng.random((3, 19)) < 0.3, -1, 5), jnp.int32)
    new = jnp.asarray(rng.normal(size=(3, 19, 2, 6)), jnp.float32)
    written = jnp.asarray([page - 3, 0, 5], jnp.int32)
    want, got = [], []
    for implementation, results in (("xla", want), ("tpu", got)):
        with interpreted(implementation, races=implementation == "tpu"):
            results += update_pages(
                keys, values, positions, segments, new, new, at, at, table, written,
                implementation=implementation,
            )  # fmt: skip
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_update_is_in_place():
    """The compiled program of donated pages has no copy of the pool."""
    keys, values, positions, segments = pool("float32", pages=1000, channels=64)
    table, written = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    new, at = jnp.ones((2, 1, 2, 64)), jnp.zeros((2, 1), jnp.int32)

    def update(pages, new, at, table, written):
        return update_pages(*pages, new, new, at, at, table, written)

    arguments = ((keys, values, positions, segments), new, at, table, written)
    compiled = jax.jit(update, donate_argnums=0).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < keys.codes.nbytes / 10


def test_pages_that_the_tpu_kernel_does_not_support_are_named():
    keys, values, positions, segments = pool("float32", page=7)
    new, at = jnp.ones((1, 1, 2, 6)), jnp.zeros((1, 1), jnp.int32)
    arguments = (keys, values, positions, segments, new, new, at, at, at, at[0])
    with pytest.raises(ValueError, match="update_pages does not support pages of 7 slots"):
        update_pages(*arguments, implementation="tpu")
