"""Paged attention against float64 NumPy, contiguous attention, and the operation in JAX's tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention import paged_attention, update_pages
from pallas_kernels.stored import DTYPES, Stored

SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
SINKS = np.array([1.0, -2.0, 0.0, 5.0], np.float32)
HEADS = 4
PAGES = 40  # in the pool

# positions of each row's queries: the last tokens of rows with 41, 3, 7 and no tokens
MIXED = ((36, 37, 38, 39, 40), (0, 1, 2, -1, -1), (6, -1, -1, -1, -1), (-1, -1, -1, -1, -1))
DECODE = ((40,), (2,), (6,), (-1,))
WRITTEN = np.array([41, 3, 7, 0], np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """``queries``: positions of each row; ``packed``: with segments; ``latent``: value channels."""

    queries: tuple = MIXED
    page: int = 8
    kv_heads: int = 2
    channels: int = 8
    packed: bool = False
    latent: int | None = None
    options: dict = dataclasses.field(default_factory=dict)


CASES = {
    "decode": Case(DECODE),
    "mixed": Case(),
    "primes, 4:1 heads": Case(page=7, kv_heads=1, channels=7),
    "window": Case(options=dict(window=9)),
    "packed": Case(packed=True),
    "packed, everything": Case(
        packed=True,
        options=dict(window=13, until_bt=np.asarray(MIXED, np.int32) + 2, alibi_slopes_h=SLOPES,
                     sinks_h=SINKS, soft_cap=3.0, scale=0.4),
    ),
    "not causal": Case(options=dict(causal=False)),
    "latent": Case(kv_heads=1, channels=12, latent=8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Contiguous arrays ``[b, s, …]`` in NumPy and the same tokens in pages."""

    q_bthc: np.ndarray
    k_bskc: np.ndarray
    v_bskc: np.ndarray
    at_bs: np.ndarray
    in_bs: np.ndarray | None
    mask: Mask
    pages: dict
    options: dict


def inputs(case: Case, dtype: str = "float32", q_dtype="float32") -> Inputs:
    """Every slot without a token is NaN, and so is every page that no row has."""
    rng = np.random.default_rng(0)
    q_at = np.asarray(case.queries, np.int32)
    b, t = q_at.shape
    n = -(-WRITTEN.max() // case.page) + 1
    s, k, c = n * case.page, case.kv_heads, case.channels
    q = rng.normal(size=(b, t, HEADS, c)).astype(np.float32)
    vectors = rng.normal(size=(2, b, s, k, c)).astype(np.float32)
    at = np.broadcast_to(np.arange(s, dtype=np.int32), (b, s)).copy()
    inside = np.where(at < 20, 5, 3).astype(np.int32) if case.packed else None
    if case.packed:  # the second document begins at position 0
        at = np.where(at < 20, at, at - 20)
        q_at = np.where(q_at >= 20, q_at - 20, q_at)
    at[0, 4] = -1  # padding that was written all the same
    # every row's pages in a random order; a row has only the pages that it requires
    table = rng.permutation(PAGES).astype(np.int32)[: b * n].reshape(b, n)
    table[np.arange(n) * case.page >= WRITTEN[:, None]] = -1

    def paged(a_bs, empty):
        pool = np.full((PAGES, case.page, *a_bs.shape[2:]), empty, a_bs.dtype)
        for row in range(b):
            for i in range(WRITTEN[row]):
                pool[table[row, i // case.page], i % case.page] = a_bs[row, i]
        return pool

    def stored(a_bskc):
        whole = Stored.of(jnp.asarray(a_bskc), dtype)

        def pool(a):
            a = np.asarray(a)
            empty = np.nan if jnp.issubdtype(a.dtype, jnp.floating) else 77
            return jnp.asarray(np.swapaxes(paged(a, empty), 1, 2))

        return jax.tree.map(pool, whole), np.asarray(whole.load(), np.float64)

    (keys, k_bskc), (values, v_bskc) = stored(vectors[0]), stored(vectors[1])
    if case.latent is not None:
        values, v_bskc = None, k_bskc[..., : case.latent]
    pages = dict(
        keys=keys,
        values=values,
        positions_ps=jnp.asarray(paged(at, 0)),
        segments_ps=None if inside is None else jnp.asarray(paged(inside, 5)),
        table_bn=jnp.asarray(table),
        written_b=jnp.asarray(WRITTEN),
    )
    fields = {f.name for f in dataclasses.fields(Mask)}
    static = {name: v for name, v in case.options.items() if name in fields}
    options = {name: v for name, v in case.options.items() if name not in fields}
    options = {n: jnp.asarray(v) if n == "sinks_h" else v for n, v in options.items()}
    if case.latent is not None:
        options["value_channels"] = case.latent
    q_in = np.where(np.asarray(case.queries) < 20, 5, 3) if case.packed else None
    mask = Mask(q_positions_bt=q_at, q_segments_bt=q_in, **static)
    mask = jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), mask)
    q = np.asarray(jnp.asarray(q, q_dtype).astype(jnp.float32))
    return Inputs(q, k_bskc, v_bskc, at, inside, mask, pages, options)


def run(given: Inputs, implementation, q_dtype="float32", **options):
    q = jnp.asarray(given.q_bthc, q_dtype)
    return paged_attention(
        q, **given.pages, mask=given.mask, **given.options, implementation=implementation, **options
    )


def equation(given: Inputs) -> np.ndarray:
    """Attention of one query and head after another, in float64."""
    mask, options = given.mask, given.options
    b, t, h, c = given.q_bthc.shape
    group = h // given.k_bskc.shape[2]
    y = np.zeros((b, t, h, given.v_bskc.shape[-1]))
    q_at, until = np.asarray(mask.q_positions_bt), mask.until_bt
    for row, i, head in np.ndindex(b, t, h):
        at, here = given.at_bs[row, : WRITTEN[row]], q_at[row, i]
        reach = here if until is None else max(here, int(until[row, i]))
        seen = (at >= 0) & (here >= 0)
        if mask.causal:
            seen &= at <= reach
        if mask.window is not None:
            seen &= np.abs(here - at) < mask.window
        if mask.q_segments_bt is not None:
            seen &= given.in_bs[row, : WRITTEN[row]] == int(mask.q_segments_bt[row, i])
        k, v = (a[row, : WRITTEN[row], head // group][seen] for a in (given.k_bskc, given.v_bskc))
        scores = k @ given.q_bthc[row, i, head].astype(np.float64)
        scores *= options.get("scale") or c**-0.5
        if "alibi_slopes_h" in options:
            scores -= options["alibi_slopes_h"][head] * np.abs(here - at[seen])
        if "soft_cap" in options:
            scores = options["soft_cap"] * np.tanh(scores / options["soft_cap"])
        weights = np.exp(scores)
        total = weights.sum()
        if "sinks_h" in options:
            total += np.exp(np.float64(options["sinks_h"][head]))
        if total > 0:
            y[row, i, head] = weights @ v / total
    return y


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_value(case, implementation):
    given = inputs(CASES[case])
    options = {} if implementation == "reference" else dict(blocks=dict(key=16))
    got = run(given, implementation, **options)
    np.testing.assert_allclose(got, equation(given), atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_pages(dtype, implementation):
    given = inputs(CASES["mixed"], dtype)
    np.testing.assert_allclose(run(given, implementation), equation(given), atol=2e-6)


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


@pytest.mark.parametrize("implementation", ["xla"])
@pytest.mark.parametrize("case", ["decode", "packed, everything"])
def test_a_row_does_not_depend_on_other_rows(case, implementation):
    """Bit by bit: with other rows of other lengths, and at another index."""
    given = inputs(CASES[case])
    blocks = dict(key=16)
    whole = run(given, implementation, blocks=blocks)
    order = jnp.asarray([2, 1, 0, 3])
    pages = given.pages | {n: given.pages[n][order] for n in ("table_bn", "written_b")}
    pages["written_b"] = pages["written_b"].at[1].set(0)
    others = dataclasses.replace(
        given,
        q_bthc=given.q_bthc[order],
        mask=jax.tree.map(lambda a: a[order], given.mask),
        pages=pages,
    )
    alone = run(others, implementation, blocks=blocks)
    np.testing.assert_array_equal(whole[2], alone[0])
    np.testing.assert_array_equal(whole[0], alone[2])
    pages["table_bn"] = pages["table_bn"].at[2].set(-1)
    alone = run(dataclasses.replace(others, pages=pages), implementation, blocks=blocks)
    np.testing.assert_array_equal(whole[2], alone[0])


def test_gradients_are_those_of_contiguous_attention():
    """Of queries, float pages and sinks, through the table."""
    given = inputs(CASES["packed, everything"])
    sinks = given.options["sinks_h"]
    options = {name: a for name, a in given.options.items() if name != "sinks_h"}
    k, v = (jnp.asarray(a, jnp.float32) for a in (given.k_bskc, given.v_bskc))
    held = np.arange(k.shape[1]) < WRITTEN[:, None]
    mask = given.mask.with_keys(
        jnp.asarray(np.where(held, given.at_bs, -1)), jnp.asarray(given.in_bs)
    )

    def contiguous(q, k, v, sinks):
        return flash_attention(
            q, k, v, mask, sinks_h=sinks, implementation="reference", **options
        )  # fmt: skip

    def paged(q, k, v, sinks):
        pages = dict(given.pages)
        table = pages["table_bn"]
        index = jnp.where(table >= 0, table, PAGES)
        for name, a in (("keys", k), ("values", v)):
            by_page = jnp.swapaxes(a.reshape(*table.shape, -1, *a.shape[2:]), 2, 3)
            codes = pages[name].codes.at[index].set(by_page, mode="drop")
            pages[name] = dataclasses.replace(pages[name], codes=codes)
        return paged_attention(q, **pages, mask=given.mask, sinks_h=sinks, **options)

    operands = (jnp.asarray(given.q_bthc), k, v, sinks)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=given.q_bthc.shape), jnp.float32)
    want, got = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * dy), argnums=range(4)))(*operands)
        for f in (contiguous, paged)
    )
    for a, b in zip(got, want, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5)
