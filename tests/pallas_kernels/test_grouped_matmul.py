"""The grouped matmul against its equation, and that against torch's products and autograd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.grouped_matmul import grouped_matmul
from tests.pallas_kernels.conftest import (
    TPUS,
    compile_for_gpu,
    compile_for_tpu,
    interpreted,
    lower_for_gpu,
    topology_mesh,
    triton_kernels,
)

# m, d, f, group sizes: one row, primes, empty groups, rows of no group, no rows in any, tiles that
# three groups share, axes of several blocks that they do not fill
SMALL = [
    (1, 3, 5, [1]),
    (13, 7, 11, [5, 0, 1, 7]),
    (17, 8, 3, [0, 4, 6, 0]),
    (6, 5, 2, [0, 0]),
]
LARGE = [(211, 300, 140, [0, 40, 1, 3, 0, 100, 0]), (96, 140, 300, [32, 64])]
BLOCKS = {
    "xla": dict(rows=24),
    "tpu": dict(rows=32, inner=256, columns=256),
    "gpu": dict(rows=32, inner=64, columns=64),
}


def _arrays(m, d, f, sizes, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = (m, d), (len(sizes), d, f), (m, f)
    x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return x, w, dy, jnp.asarray(sizes, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _run(implementation, x, w, dy, sizes, blocks=()):
    def product(x, w):
        options = dict(implementation=implementation, blocks=dict(blocks))
        return grouped_matmul(x, w, sizes, **options)

    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(dy)


def _check(implementation, case, dtype, tolerance, races=False):
    """Value and gradients against the equation in float64; rows of no group hold NaN."""
    blocks = tuple(BLOCKS[implementation].items())
    with jax.enable_x64(True):
        x, w, dy, sizes = _arrays(*case, jnp.dtype(dtype))
        wide = [a.astype(jnp.float64) for a in (x, w, dy)]
        want = [np.asarray(a) for a in _run("reference", *wide, sizes)]
        x, dy = (a.at[sum(case[3]) :].set(jnp.nan) for a in (x, dy))
    with jax.enable_x64(dtype == "float64"), interpreted(implementation, races=races):
        got = jax.block_until_ready(_run(implementation, x, w, dy, sizes, blocks))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        scale = max(np.abs(b).max(), 1)
        np.testing.assert_allclose(np.float64(a) / scale, b / scale, atol=tolerance)
    assert not np.any(np.float64(got[2])[np.array(case[3]) == 0])
    for rows in got[:2]:
        assert not np.any(np.float64(rows)[sum(case[3]) :])


@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-14), ("float32", 2e-6), ("bfloat16", 5e-3)]
)
def test_xla_is_the_equation(case, dtype, tolerance):
    _check("xla", case, dtype, tolerance)


@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_tpu_is_the_equation(case):
    _check("tpu", case, "float32", 2e-6)


def test_tpu_in_bfloat16():
    _check("tpu", LARGE[0], "bfloat16", 5e-3)


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [
        *((case, "float32", 2e-6) for case in (*SMALL[1:], *LARGE)),
        (SMALL[0], "bfloat16", 5e-3),
        (LARGE[0], "float16", 5e-4),
    ],
    ids=str,
)
def test_gpu_is_the_equation(case, dtype, tolerance):
    _check("gpu", case, dtype, tolerance)


def test_the_tpu_kernels_race_with_no_copy():
    _check("tpu", LARGE[0], "float32", 2e-6, races=True)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_sizes(data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    m = max(sum(sizes) + data.draw(st.integers(0, 5)), 1)
    # a chunk, or an eighth of it, may be longer than all the rows
    d, f, rows = (data.draw(st.integers(1, n)) for n in (5, 5, 500))
    x, w, dy, sizes = _arrays(m, d, f, sizes, np.float32)
    got = _run("xla", x, w, dy, sizes, (("rows", rows),))
    want = [np.zeros(a.shape) for a in got]
    ends = np.cumsum(sizes)
    for e, at in enumerate(map(slice, ends - np.array(sizes), ends)):
        want[0][at], want[1][at], want[2][e] = x[at] @ w[e], dy[at] @ w[e].T, x[at].T @ dy[at]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_ragged_products_where_there_is_no_cpu():
    """What other platforms run as ``xla`` is XLA's, and the same."""
    x, w, dy, sizes = _arrays(*SMALL[1], np.float32)
    text = _run.trace("xla", x, w, dy, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in text
    assert "ragged_dot" not in _run.lower("xla", x, w, dy, sizes).as_text()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_torch(case):
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        x, w, dy, sizes = _arrays(*case)
        got = _run("reference", x, w, dy, sizes)
    tx, tw = (torch.tensor(np.array(a), requires_grad=True) for a in (x, w))
    groups = torch.split(tx, [*case[3], case[0] - sum(case[3])])
    products = [g @ m for g, m in zip(groups, tw, strict=False)]
    y = torch.cat([*products, 0 * groups[-1] @ tw[0]])
    y.backward(torch.tensor(np.array(dy)))
    for a, b in zip(got, (y.detach(), tx.grad, tw.grad), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-12, atol=1e-12)


def test_work_and_memory_are_the_rows_own():
    """On a CPU: one group's weights are copied, not all; no row is copied once an expert."""

    def temporary(m, e):
        shapes = ((m, 64), (e, 64, 64), (m, 64))
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        lowered = _run.lower("xla", *arrays, jax.ShapeDtypeStruct((e,), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many, long = temporary(1024, 8), temporary(1024, 64), temporary(8192, 8)
    bytes_of_x = 1024 * 64 * 4
    assert many - few < bytes_of_x / 4 + 2 * 56 * 64 * 64 * 4
    assert long - few <= 4 * 7 * bytes_of_x


def test_refusals():
    x, w, _, sizes = _arrays(4, 3, 2, [1, 2], jnp.float32)
    for bad, message in [
        ((x[0], w, sizes), r"x_md.shape=\(3,\): must be \(m, d\)"),
        ((x, w[0], sizes), r"weights_edf.shape=\(3, 2\): must be \(e, d, f\)"),
        ((x, w[:, :2], sizes), r"weights_edf.shape=\(2, 2, 2\): must be \(2, 3, 2\)"),
        ((x, w.astype(jnp.bfloat16), sizes), "weights_edf.dtype='bfloat16': must be x_md's"),
        ((x, w, sizes[:1]), r"group_sizes_e.shape=\(1,\): must be \(2,\)"),
        ((x, w, sizes.astype(jnp.float32)), "group_sizes_e.dtype='float32': must be an integer"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            grouped_matmul(*bad)
    half = (x.astype(jnp.float16), w.astype(jnp.float16), sizes)
    with jax.enable_x64(True):
        double = (x.astype(jnp.float64), w.astype(jnp.float64), sizes)
    for arrays, options, message in [
        (double, dict(implementation="gpu"), "implementation='gpu': .* dtype float64: must be "),
        (half, dict(implementation="tpu"), "implementation='tpu': .* dtype float16: must be bf"),
        ((x[:0], w, sizes), dict(implementation="tpu"), r".* a size of 0: x_md \(0, 3\)"),
        ((x[:0], w, sizes), dict(implementation="gpu"), r".* a size of 0: x_md \(0, 3\)"),
        ((x, w, sizes), dict(implementation="xla", blocks=dict(inner=64)), "blocks.inner=64: no"),
        ((x, w, sizes), dict(blocks=dict(rows=0)), "blocks.rows=0: must be > 0"),
        ((x, w, sizes), dict(implementation="xl"), "implementation='xl': .* 'xla'"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            grouped_matmul(*arrays, **options)


def _shapes(dtype, m, d, f, e):
    arrays = [jax.ShapeDtypeStruct(s, dtype) for s in ((m, d), (e, d, f), (m, f))]
    return *arrays, jax.ShapeDtypeStruct((e,), jnp.int32)


def _chosen(x, w, dy, sizes):
    """Value and gradients by whatever the platform it is lowered for has."""
    return _run(None, x, w, dy, sizes)


COMPILED = {
    "bfloat16": (jnp.bfloat16, 2000, 2048, 1408, 8),
    "float32, no axis a whole number of blocks": (jnp.float32, 1003, 1100, 700, 5),
    "less than a tile": (jnp.bfloat16, 7, 80, 72, 3),
}


KERNELS = ["grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dweights"]


def test_lowers_for_a_gpu():
    """Chosen by the platform it is lowered for, forward and backward, where it can serve.

    Rows and weights go in as they are: no copy to make blocks fit.
    """
    m, d, f, e = 1003, 1100, 700, 5
    text = lower_for_gpu(_chosen, *_shapes(jnp.float32, m, d, f, e))
    assert triton_kernels(text) == KERNELS
    product, dx, dweights = (line for line in text.splitlines() if "gpu.triton" in line)
    for line in (product, dx):
        assert f"tensor<{e}x{d}x{f}xf32>" in line
    assert f"(tensor<{e + 2}xi32>, tensor<{m}x{d}xf32>, tensor<{m}x{f}xf32>)" in dweights
    assert not triton_kernels(lower_for_gpu(_chosen, *_shapes(jnp.float32, 0, 8, 8, 2)))


@pytest.mark.gpu_compile
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_a_gpu(case):
    text = compile_for_gpu(_chosen, *_shapes(*COMPILED[case])).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3


@pytest.mark.gpu_compile
def test_a_block_that_does_not_fit_a_gpu_fails():
    blocks = dict(rows=256, inner=256, columns=256)
    run = functools.partial(grouped_matmul, implementation="gpu", blocks=blocks)
    x, w, _, sizes = _shapes(jnp.bfloat16, 512, 1024, 1024, 2)
    with pytest.raises(Exception, match="(?i)shared memory"):
        compile_for_gpu(run, x, w, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 5e-3), ("float16", 5e-4)]
)
def test_on_a_gpu(case, dtype, tolerance, gpu):
    _check("gpu", case, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("case", COMPILED)
def test_at_size_on_a_gpu(case, gpu):
    """With the blocks of the table, and groups that end anywhere."""
    dtype, m, d, f, e = COMPILED[case]
    sizes = np.random.default_rng(0).multinomial(m - 1, np.full(e, 1 / e))
    x, w, dy, sizes = _arrays(m, d, f, sizes, dtype)
    want = _run("reference", *(a.astype(jnp.float32) for a in (x, w, dy)), sizes)
    for got, b in zip(_run("gpu", x, w, dy, sizes), want, strict=True):
        error = np.abs(np.float64(got) - b).max() / np.abs(b).max()
        assert error < (1e-5 if dtype == jnp.float32 else 1e-2), error


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("generation", "case"),
    [*(("v5e", case) for case in COMPILED), *((tpu, "bfloat16") for tpu in list(TPUS)[1:])],
)
def test_compiles_for_tpus(generation, case):
    mesh = topology_mesh(generation, (1,), ("data",))
    compiled = compile_for_tpu(_chosen, mesh, *_shapes(*COMPILED[case]))
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    for kernel in ("grouped_matmul_dx", "grouped_matmul_dweights"):
        assert kernel in text
    # no transposed copy of the weights; what compilers of various versions stage is below 256 KiB
    dtype, _, d, f, e = COMPILED[case]
    weights = e * d * f * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < max(weights, 2**18)


@pytest.mark.tpu_compile
def test_compiles_inside_a_sharded_program():
    """Each chip has its own rows, its own experts' weights and its own sizes."""
    mesh = topology_mesh("v5p", (2, 2), ("data", "expert"))
    rows, experts = PartitionSpec(("data", "expert")), PartitionSpec("expert")
    each = (rows, experts, rows, PartitionSpec(("data", "expert")))

    def run(*arrays):
        y, dx, dweights = _chosen(*arrays)
        return y, dx, jax.lax.psum(dweights, "data")

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=each, out_specs=(rows, rows, experts), check_vma=False
    )
    *arrays, _ = _shapes(jnp.bfloat16, 4096, 256, 512, 8)
    sizes = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = compile_for_tpu(sharded, mesh, *arrays, sizes, specs=each).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-gather" not in text


@pytest.mark.tpu_compile
def test_a_block_that_does_not_fit_fails():
    run = functools.partial(
        grouped_matmul, implementation="tpu", blocks=dict(rows=16, columns=16384)
    )
    x, w, _, sizes = _shapes(jnp.bfloat16, 64, 1024, 32768, 2)
    with pytest.raises(Exception, match="(?i)vmem"):
        compile_for_tpu(run, topology_mesh("v5p", (1,), ("data",)), x, w, sizes)
