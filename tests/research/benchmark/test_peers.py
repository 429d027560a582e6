"""The peers that can be run here compute what the op does, forward and backward.

Those of TPUs are interpreted. Those of GPUs (cuDNN, attention_mgpu, ragged_dot_mgpu, tokamax,
jax-linear-attention) need a GPU: there the bench itself compares every result with ours.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.benchmark import measure, ops, peers
from tests.pallas_kernels.conftest import interpreted, lower_for_gpu

ATTENTION = {"b": 1, "t": 128, "h": 1, "c": 128, "dtype": "float32"}
GROUPED = {"m": 128, "e": 4, "d": 128, "f": 128, "dtype": "float32"}
SCAN = {"b": 2, "t": 7, "d": 3, "n": 4, "dtype": "float32"}


def wrong(function, expected, arrays, platform="cpu"):
    """What `Agreement` says of ``function`` beside ``expected``, forward and backward."""
    y = expected(*arrays)
    arrays = [*arrays, jax.random.normal(jax.random.key(3), y.shape, y.dtype)]
    agreement = measure.Agreement()
    agreement.TOLERANCE = 1e-4
    right = peers.of_jax(expected).prepare(arrays, True)
    assert agreement("expected", right.values(right.run())) is None
    with interpreted(platform):
        prepared = function(arrays, True)
        return agreement("peer", prepared.values(prepared.run()))


@pytest.mark.parametrize("peer", [peers._tpu_splash, peers._tpu_flash])
def test_attention(peer):
    arrays = ops._attention(ATTENTION)
    assert wrong(peers.of_jax(peer).prepare, peers._naive_attention, arrays, "tpu") is None


def test_attention_of_torch():
    pytest.importorskip("torch")
    arrays = ops._attention({**ATTENTION, "t": 37, "h": 3, "c": 16})
    assert wrong(peers.torch_attention, peers._naive_attention, arrays) is None
    scaled = lambda q, k, v: peers._naive_attention(1.001 * q, k, v)  # noqa: E731
    assert "of the norm away" in str(wrong(peers.torch_attention, scaled, arrays))


@pytest.mark.parametrize("peer", [peers._megablox, peers._dense_experts])
def test_grouped_matmul(peer):
    arrays = ops._grouped(GROUPED)
    assert len(set(arrays[2].tolist())) > 1 and int(arrays[2].sum()) == GROUPED["m"]
    assert wrong(peers.of_jax(peer).prepare, jax.lax.ragged_dot, arrays, "tpu") is None


def test_associative_scan():
    arrays = ops._selective(SCAN)
    x, delta, a, b, c, d, z = (np.asarray(array, np.float64) for array in arrays)
    delta = np.log1p(np.exp(delta))
    state, y = np.zeros((2, 3, 4)), np.zeros(x.shape)
    for t in range(x.shape[1]):
        brought = np.einsum("bd,bn->bdn", delta[:, t] * x[:, t], b[:, t])
        state = state * np.exp(delta[:, t, :, None] * a) + brought
        y[:, t] = np.einsum("bdn,bn->bd", state, c[:, t]) + d * x[:, t]
    y *= z / (1 + np.exp(-z))
    got = jax.jit(peers._associative_scan)(*arrays)
    assert jnp.allclose(got, y, rtol=1e-4, atol=1e-5)


def test_quadratic_ssd():
    arrays = ops._ssd({"b": 2, "t": 7, "h": 4, "p": 3, "g": 2, "n": 5, "dtype": "float32"})
    assert wrong(peers.of_jax(peers._quadratic_ssd).prepare, ops.ours("ssd", "xla"), arrays) is None


PAGED = {"b": 2, "s": 256, "h": 4, "k": 2, "c": 128, "page": 16, "dtype": "float32"}


@pytest.mark.parametrize(
    ("pages", "names"), [("float32", ["contiguous"]), ("int8", list(peers._PAGED))]
)
def test_paged_attention(pages, names):
    arrays = ops._paged({**PAGED, "pages": pages})
    agreement = measure.Agreement()
    agreement.TOLERANCE = 1e-4
    ours = peers.of_jax(ops.ours("paged_attention", "reference")).prepare(arrays, False)
    assert agreement("ours", ours.values(ours.run())) is None
    for name in names:
        peer = peers.PEERS["paged_attention"]["cpu"][name].prepare(arrays, False)
        assert agreement(name, peer.values(peer.run())) is None, name


def test_jax_s_ragged_paged_attention_takes_our_pages():
    """By its own equation. The kernel requires a TPU: no interpreter supports it."""
    kernel = importlib.import_module(peers._TPU + "ragged_paged_attention.kernel")
    arrays = ops._paged({**PAGED, "pages": "float32"})
    theirs = peers._jax_ragged_pages(*arrays)
    y = kernel.ref_ragged_paged_attention(*theirs, sm_scale=PAGED["c"] ** -0.5)[:, None]
    want = ops.ours("paged_attention", "reference")(*arrays)
    np.testing.assert_allclose(y, want, atol=1e-5)
    with pytest.raises(ValueError, match="a scale for each vector"):
        peers._jax_ragged_pages(*ops._paged({**PAGED, "pages": "int8"}))


@pytest.mark.parametrize("pages", ["float32", "int8"])
def test_jax_s_paged_attention_takes_our_pages(pages):
    """It is lowered only: there is no interpreter for its products."""
    arrays = peers._jax_paged_pages(*ops._paged({**PAGED, "pages": pages}))
    assert lower_for_gpu(peers._jax_paged, *arrays).count("gpu.triton") == 1


def test_one_that_is_not_installed_is_named():
    assert peers.missing(peers.of_jax(jnp.sin)) is None
    gone = peers.of_jax(jnp.sin, "jax-elsewhere", "jax_elsewhere")
    assert peers.missing(gone) == "skipped: jax-elsewhere is not installed"


def test_every_op_has_its_peers_by_platform():
    named = {name: {p: set(t) for p, t in table.items()} for name, table in peers.PEERS.items()}
    assert set(named) == set(ops.OPS)
    assert {"torch_sdpa"} <= named["flash_attention"]["cpu"]
    assert {"cudnn", "attention_mgpu", "tokamax", "jax_linear_attention", "torch_sdpa_flash"} <= (
        named["flash_attention"]["gpu"]
    )
    assert {"jax_splash", "jax_flash", "tokamax"} <= named["flash_attention"]["tpu"]
    assert {"jax_paged", "contiguous"} <= named["paged_attention"]["gpu"]
    assert {"jax_ragged", "contiguous"} <= named["paged_attention"]["tpu"]
    assert {"megablox", "tokamax"} <= named["grouped_matmul"]["tpu"]
    assert {"ragged_dot", "tokamax"} <= named["grouped_matmul"]["gpu"]
    for name in ("selective_scan", "ssd", "wkv7"):
        assert "jax_linear_attention" in named[name]["gpu"]
