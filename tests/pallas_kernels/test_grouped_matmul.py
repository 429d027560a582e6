"""The grouped matmul against its equation, and that against torch's products and autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul

# m, d, f, group sizes: one row, primes, empty groups, rows of no group, no rows in any
CASES = [
    (1, 3, 5, [1]),
    (13, 7, 11, [5, 0, 1, 7]),
    (17, 8, 3, [0, 4, 6, 0]),
    (6, 5, 2, [0, 0]),
]


def _arrays(m, d, f, sizes, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = (m, d), (len(sizes), d, f), (m, f)
    x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return x, w, dy, jnp.asarray(sizes, jnp.int32)


def _run(implementation, x, w, dy, sizes):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *vjp(dy)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)]
)
def test_xla_is_the_equation(case, dtype, tolerance):
    with jax.enable_x64(True):
        arrays = _arrays(*case, jnp.dtype(dtype))
        wide = [a.astype(jnp.float64) for a in arrays[:3]]
        got, want = _run("xla", *arrays), _run("reference", *wide, arrays[3])
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(np.float64(a), b, rtol=tolerance, atol=tolerance)
        assert not np.any(np.float64(got[2])[np.array(case[3]) == 0])
        assert not np.any(np.float64(got[1])[sum(case[3]) :])


@pytest.mark.parametrize("case", CASES, ids=str)
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


def test_rows_of_no_group_may_hold_anything():
    x, w, dy, sizes = _arrays(9, 4, 3, [2, 3], jnp.float32)
    x, dy = x.at[5:].set(jnp.nan), dy.at[5:].set(jnp.inf)
    for a in jax.jit(_run, static_argnums=0)("xla", x, w, dy, sizes):
        assert np.all(np.isfinite(a))


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
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*bad)
    for name in ("tpu", "gpu"):
        with pytest.raises(ValueError, match="cannot serve it: there is no"):
            grouped_matmul(x, w, sizes, implementation=name)
