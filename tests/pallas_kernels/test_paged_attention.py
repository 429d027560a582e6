"""Paged attention against float64 NumPy, contiguous attention, and the operation in JAX's tree."""

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention import paged_attention, xla
from pallas_kernels.stored import DTYPES, Stored
from tests.pallas_kernels.conftest import (
    interpreted,
)

SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
SINKS = np.array([1.0, -2.0, 0.0, 5.0], np.float32)
HEADS = 4
PAGES = 40  # in the pool

# positions of each row's queries: the last tokens of rows with 41, 3, 7 and no tokens
MIXED = ((36, 37, 38, 39, 40), (0, 1, 2, -1, -1), (6, -1, -1, -1, -1), (-1, -1, -1, -1, -1))
DECODE = ((40,), (2,), (6,), (-1,))


@dataclasses.dataclass(frozen=True)
class Case:
    """``queries``: positions of each row; ``packed``: with segments; ``latent``: value channels."""

    queries: tuple = MIXED
    page: int = 8
    kv_heads: int = 2
    channels: int = 8
    packed: bool = False
    latent: int | None = None
    written: tuple = (41, 3, 7, 0)
    padding: bool = True  # one of the written tokens is padding
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
    written: tuple
    pages: dict
    options: dict


def inputs(case: Case, dtype: str = "float32", q_dtype="float32") -> Inputs:
    """Every slot without a token is NaN, and so is every page that no row has."""
    rng = np.random.default_rng(0)
    q_at = np.asarray(case.queries, np.int32)
    (b, t), held = q_at.shape, np.asarray(case.written, np.int32)
    n = -(-held.max() // case.page) + 1
    s, k, c = n * case.page, case.kv_heads, case.channels
    q = rng.normal(size=(b, t, HEADS, c)).astype(np.float32)
    vectors = rng.normal(size=(2, b, s, k, c)).astype(np.float32)
    at = np.broadcast_to(np.arange(s, dtype=np.int32), (b, s)).copy()
    inside = np.where(at < 20, 5, 3).astype(np.int32) if case.packed else None
    if case.packed:  # the second document begins at position 0
        at = np.where(at < 20, at, at - 20)
        q_at = np.where(q_at >= 20, q_at - 20, q_at)
    if case.padding:
        at[0, 4] = -1
    # every row's pages in a random order; a row has only the pages that it requires
    table = rng.permutation(PAGES).astype(np.int32)[: b * n].reshape(b, n)
    table[np.arange(n) * case.page >= held[:, None]] = -1

    def paged(a_bs, empty):
        pool = np.full((PAGES, case.page, *a_bs.shape[2:]), empty, a_bs.dtype)
        for row in range(b):
            for i in range(held[row]):
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
        written_b=jnp.asarray(held),
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
    return Inputs(q, k_bskc, v_bskc, at, inside, mask, case.written, pages, options)


def operation(given: Inputs, implementation, q_dtype=jnp.float32, races=False, **options):
    """The operation with the options of ``given``, as a compiled function of such inputs."""
    options |= {name: a for name, a in given.options.items() if name != "sinks_h"}

    @jax.jit
    def call(q, pages, mask, sinks):
        return paged_attention(
            q, **pages, mask=mask, sinks_h=sinks, implementation=implementation, **options
        )

    def of_inputs(given: Inputs):
        q = jnp.asarray(given.q_bthc, q_dtype)
        with interpreted(implementation, races=races):
            return call(q, given.pages, given.mask, given.options.get("sinks_h"))

    return of_inputs


def run(given: Inputs, *arguments, **options):
    return operation(given, *arguments, **options)(given)


def equation(given: Inputs) -> np.ndarray:
    """Attention of one query and head after another, in float64."""
    mask, options = given.mask, given.options
    b, t, h, c = given.q_bthc.shape
    group = h // given.k_bskc.shape[2]
    y = np.zeros((b, t, h, given.v_bskc.shape[-1]))
    q_at, until = np.asarray(mask.q_positions_bt), mask.until_bt
    for row, i, head in np.ndindex(b, t, h):
        at, here = given.at_bs[row, : given.written[row]], q_at[row, i]
        reach = here if until is None else max(here, int(until[row, i]))
        seen = (at >= 0) & (here >= 0)
        if mask.causal:
            seen &= at <= reach
        if mask.window is not None:
            seen &= np.abs(here - at) < mask.window
        if mask.q_segments_bt is not None:
            seen &= given.in_bs[row, : given.written[row]] == int(mask.q_segments_bt[row, i])
        k, v = (
            a[row, : given.written[row], head // group][seen] for a in (given.k_bskc, given.v_bskc)
        )
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


SMALL = {  # blocks, so that there are several
    "reference": None,
    "xla": dict(key=16),
    "tpu": dict(query=8, key=128),
    "gpu": dict(query=16, key=16, splits=2),
}
# the slots in a page that the TPU's kernel supports
TILE = {"float32": 8, "bfloat16": 16, "int8": 32, "int4": 32, "float8_e4m3fn": 32}


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *((case, name) for name in ("reference", "xla") for case in CASES),
        *((case, name) for name in ("tpu", "gpu") for case in ("packed, everything", "latent")),
        ("primes, 4:1 heads", "gpu"),
    ],
)
def test_value(case, implementation):
    given = inputs(CASES[case])
    got = run(given, implementation, blocks=SMALL[implementation])
    np.testing.assert_allclose(got, equation(given), atol=2e-6)
    assert got.shape == equation(given).shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["decode", "mixed", "latent"])
def test_stored_pages(case, dtype):
    given = inputs(CASES[case], dtype)
    for implementation in ("reference", "xla")[case != "mixed" :]:
        got = run(given, implementation, blocks=SMALL[implementation])
        np.testing.assert_allclose(got, equation(given), atol=2e-6, err_msg=implementation)


@pytest.mark.parametrize("implementation", SMALL)
def test_nan_is_not_hidden(implementation):
    given = inputs(CASES["decode"])
    q = given.q_bthc.copy()
    q[1, 0, 2] = np.nan
    given = dataclasses.replace(given, q_bthc=q)
    nan = np.isnan(run(given, implementation, blocks=SMALL[implementation]))
    assert nan[1, 0, 2].all() and nan.sum() == nan[1, 0, 2].size


def test_many_queries_of_stored_pages(monkeypatch):
    """On a CPU many queries and few have different products."""
    given = inputs(CASES["mixed"], "int4")
    monkeypatch.setattr(xla, "FEW", 1)
    np.testing.assert_allclose(run(given, "xla"), equation(given), atol=2e-6)


@pytest.mark.parametrize(
    ("case", "dtype", "implementation"),
    [
        ("mixed", "bfloat16", "tpu"), ("decode", "int8", "tpu"), ("mixed", "int4", "tpu"),
        ("mixed", "float8_e4m3fn", "gpu"), ("decode", "int8", "gpu"), ("mixed", "int4", "gpu"),
    ],
)  # fmt: skip
def test_stored_pages_in_kernels(case, dtype, implementation):
    given = inputs(dataclasses.replace(CASES[case], page=TILE[dtype]), dtype)
    blocks = dict(SMALL[implementation])
    if (dtype, implementation) == ("int4", "gpu"):
        blocks["splits"] = 1  # XLA:CPU's code for the interpreted kernel with 2 ends the process
    got = run(given, implementation, blocks=blocks)
    np.testing.assert_allclose(got, equation(given), atol=2e-6)


def test_the_tpu_kernel_races_with_no_copy():
    """Also with several groups of pages, heads apart, and pages that a row does not have."""
    case = Case(((299, 300), (2, -1)), page=32, channels=8, written=(301, 3), packed=True)
    given = inputs(case, "int8")
    got = run(given, "tpu", races=True, blocks=SMALL["tpu"])
    np.testing.assert_allclose(got, equation(given), atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_queries_in_bfloat16(implementation):
    case = dataclasses.replace(CASES["mixed"], page=TILE["bfloat16"])
    given = inputs(case, "bfloat16", "bfloat16")
    got = run(given, implementation, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), equation(given), atol=2e-2)


@pytest.mark.parametrize("options", [{}, dict(window=9, soft_cap=2.0)])
def test_is_the_ragged_paged_attention_of_jax(options):
    """Its queries are the last tokens of their rows, and keys and values alternate."""
    module = importlib.import_module(
        "jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel"
    )
    given = inputs(Case(padding=False, options=options))
    got = run(given, "xla", blocks=SMALL["xla"])
    keys, values = (given.pages[name].codes for name in ("keys", "values"))
    pages = jnp.stack([jnp.swapaxes(a, 1, 2) for a in (keys, values)], 3)
    counts = (np.asarray(MIXED) >= 0).sum(1)
    queries = np.concatenate([given.q_bthc[row, :n] for row, n in enumerate(counts)])
    want = module.ref_ragged_paged_attention(
        jnp.asarray(queries),
        pages.reshape(*pages.shape[:2], -1, pages.shape[-1]),
        given.pages["written_b"],
        jnp.maximum(given.pages["table_bn"], 0),
        jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        jnp.asarray([3], jnp.int32),
        sm_scale=given.q_bthc.shape[-1] ** -0.5,
        sliding_window=options.get("window"),
        soft_cap=options.get("soft_cap"),
    )
    got = np.concatenate([got[row, :n] for row, n in enumerate(counts)])
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(value_channels=3), "value_channels=3: requires values=None"),
        (dict(values=None), "value_channels=None: without values it must be in 1…8"),
        (dict(segments_ps=jnp.zeros((PAGES, 8), jnp.int32)), "segments='one of two'"),
        (dict(mask=Mask()), "mask.q_positions=None: is required"),
        (
            dict(mask=Mask.of_tokens(jnp.zeros((4, 5), jnp.int32))),
            "mask.k_positions_bs='given': must be None",
        ),
        (dict(table_bn=jnp.zeros((3, 2), jnp.int32)), "written.shape=(4,): must be (3,)"),
        (dict(positions_ps=jnp.zeros((PAGES, 7), jnp.int32)), "positions_ps.shape"),
        (dict(written_b=jnp.zeros(4)), "written.dtype='float32': must be an integer type"),
        (dict(soft_cap=0.0), "soft_cap=0.0: must be > 0"),
        (dict(blocks=dict(keys=4)), "blocks.keys=4: no such size"),
        (dict(implementation="tpus"), "implementation='tpus'"),
    ],
)
def test_what_is_not_described_is_refused(change, message):
    given = inputs(CASES["mixed"])
    arguments = dict(given.pages, mask=given.mask) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_attention(jnp.asarray(given.q_bthc), **arguments)


def test_what_a_kernel_does_not_support_is_named():
    def refused(implementation, case, dtype="float32", q_dtype=jnp.float32):
        with pytest.raises(ValueError) as error:
            run(inputs(case, dtype), implementation, q_dtype)
        return str(error.value)

    assert "pages of 7 slots of float32: must be a multiple of 8" in refused("tpu", Case(page=7))
    assert "pages of 16 slots of int8" in refused("tpu", Case(page=16), "int8")
    assert "pages of float16" in refused("tpu", Case(), "float16")
    assert "dtype float16 of queries" in refused("tpu", Case(), q_dtype=jnp.float16)
    assert "288 channels per head: at most 256" in refused("gpu", Case(channels=288))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [("decode", "xla"), ("packed, everything", "xla"), ("mixed", "tpu"), ("mixed", "gpu")],
)
def test_a_row_does_not_depend_on_other_rows(case, implementation):
    """Bit by bit: with other rows of other lengths, and at another index."""
    given = inputs(CASES[case])
    result = operation(given, implementation, blocks=SMALL[implementation])
    whole = result(given)
    order = jnp.asarray([2, 1, 0, 3])
    pages = given.pages | {n: given.pages[n][order] for n in ("table_bn", "written_b")}
    pages["written_b"] = pages["written_b"].at[1].set(0)
    others = dataclasses.replace(
        given,
        q_bthc=given.q_bthc[order],
        mask=jax.tree.map(lambda a: a[order], given.mask),
        pages=pages,
    )
    alone = result(others)
    np.testing.assert_array_equal(whole[2], alone[0])
    np.testing.assert_array_equal(whole[0], alone[2])
    pages["table_bn"] = pages["table_bn"].at[2].set(-1)
    alone = result(dataclasses.replace(others, pages=pages))
    np.testing.assert_array_equal(whole[2], alone[0])


def test_gradients_are_those_of_contiguous_attention():
    """Of queries, float pages and sinks, through the table."""
    given = inputs(CASES["packed, everything"])
    sinks = given.options["sinks_h"]
    options = {name: a for name, a in given.options.items() if name != "sinks_h"}
    k, v = (jnp.asarray(a, jnp.float32) for a in (given.k_bskc, given.v_bskc))
    held = np.arange(k.shape[1]) < np.asarray(given.written)[:, None]
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
