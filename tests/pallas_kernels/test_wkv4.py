"""`wkv4` against float64, against transformers, and with the arguments that cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.wkv import wkv4
from tests.pallas_kernels.conftest import (
    TPUS,
    compile_for_gpu,
    compile_for_tpu,
    interpreted,
    lower_for_gpu,
    topology_mesh,
    triton_kernels,
)


def inputs(b, t, d, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    w, u = rng.normal(size=(2, d))
    k, v = rng.normal(size=(2, b, t, d)) * np.array([scale, 1.0])[:, None, None, None]
    state = (rng.normal(size=(b, d)), rng.uniform(0.5, 2, size=(b, d)), rng.normal(size=(b, d)))
    return w, u, k, v, state


def value_and_gradients(implementation, arrays, dtype, segments=None):
    arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)

    def loss(w, u, k, v, state):
        y, final = wkv4(
            w, u, k, v, segment_ids_bt=segments, initial_state=state,
            implementation=implementation, blocks={"chunk": 4, "rows": 2},
        )  # fmt: skip
        weights = jnp.cos(jnp.arange(y.size, dtype=final[0].dtype)).reshape(y.shape)
        total = jnp.sum(y * weights) + jnp.sum(final[0] * 0.3) + jnp.sum(jnp.sin(final[1]))
        return total + 1e-3 * jnp.sum(final[2]), (y, final)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
    (_, results), gradients = run(*arrays)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (results, gradients))


# length 1, primes, extreme logits, more channels than a program of the TPU's takes
CASES = {
    "one token": (1, 1, 1, 1, False),
    "packed": (2, 13, 5, 1, True),
    "whole chunks": (1, 16, 3, 30, False),
    "extreme": (2, 11, 4, 1e4, True),
    "many channels": (1, 9, 300, 1, True),
}


@functools.cache
def exact(case):
    b, t, d, scale, packed = CASES[case]
    arrays = inputs(b, t, d, scale)
    segments = np.cumsum(np.random.default_rng(1).uniform(size=(b, t)) < 0.4, 1) if packed else None
    with jax.enable_x64(True):
        return arrays, segments, value_and_gradients("reference", arrays, jnp.float64, segments)


def assert_close(got, want, case):
    # float32 holds an exponent of 1e4 to 1e-3 only
    tolerance = 1e-4 if case != "extreme" else 2e-2
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        *((name, case) for name in ("xla", "tpu") for case in CASES),
        *(("gpu", case) for case in ("one token", "extreme", "many channels")),
    ],
)
def test_equals_float64(implementation, case):
    arrays, segments, want = exact(case)
    with interpreted(implementation):
        got = value_and_gradients(implementation, arrays, jnp.float32, segments)
    assert_close(got, want, case)


def test_the_tpu_kernels_do_not_race():
    arrays, segments, want = exact("many channels")
    with interpreted("tpu", races=True):
        got = value_and_gradients("tpu", arrays, jnp.float32, segments)
    assert_close(got, want, "many channels")


def test_equals_transformers():
    torch = pytest.importorskip("torch")
    rwkv = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    w, u, k, v, state = jax.tree.map(lambda x: np.asarray(x, np.float32), inputs(2, 9, 6))
    want, want_state = rwkv.rwkv_linear_attention_cpu(
        *(torch.tensor(x) for x in (w, u, k, v)), state=[torch.tensor(x) for x in state]
    )
    y, final = wkv4(w, u, k, v, initial_state=state, implementation="reference")
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-5, atol=1e-5)
    for g, e in zip(final, want_state, strict=True):
        np.testing.assert_allclose(g, e.numpy(), rtol=1e-5, atol=1e-5)


def test_segments_and_halves():
    """A packed row is its segments one by one; a row is its halves, the state handed on."""
    w, u, k, v, _ = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs(1, 10, 3))
    y, final = wkv4(w, u, k, v, segment_ids_bt=jnp.array([[0] * 4 + [1] + [2] * 5]))
    parts = [wkv4(w, u, k[:, i:j], v[:, i:j]) for i, j in ((0, 4), (4, 5), (5, 10))]
    np.testing.assert_allclose(y, jnp.concatenate([p[0] for p in parts], 1), rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5), final, parts[-1][1])
    whole, _ = wkv4(w, u, k, v)
    first, state = wkv4(w, u, k[:, :3], v[:, :3])
    second, _ = wkv4(w, u, k[:, 3:], v[:, 3:], initial_state=state)
    np.testing.assert_allclose(whole, jnp.concatenate([first, second], 1), rtol=1e-5, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(b=st.integers(1, 3), t=st.integers(1, 20), chunk=st.integers(1, 24), data=st.data())
def test_any_shape(b, t, chunk, data):
    """Chunks that divide the length, do not, and are longer than it."""
    row = st.lists(st.integers(0, 1), min_size=t, max_size=t)
    segments = jnp.array(data.draw(st.lists(row, min_size=b, max_size=b)))
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(b, t, 3)[:4]]
    want = wkv4(*arrays, segment_ids_bt=segments, implementation="reference")
    got = wkv4(*arrays, segment_ids_bt=segments, blocks={"chunk": chunk})
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_bfloat16():
    w, u, k, v, _ = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs(1, 7, 3))
    y, final = wkv4(w, u, k, v)
    assert y.dtype == jnp.bfloat16 and final[0].dtype == jnp.float32
    want, _ = wkv4(*(x.astype(jnp.float32) for x in (w, u, k, v)), implementation="reference")
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_btd": jnp.zeros((2, 3))}, "k.shape="),
        ({"v_btd": jnp.zeros((1, 2, 4))}, "v.shape="),
        ({"w_d": jnp.zeros(5)}, "w.shape="),
        ({"u_d": jnp.zeros(4, int)}, "u.dtype="),
        ({"segment_ids_bt": jnp.zeros((1, 3))}, "segment_ids.dtype="),
        ({"initial_state": (jnp.zeros((1, 4)),)}, "initial_state=1"),
        ({"initial_state": (jnp.zeros((1, 3)),) * 3}, "initial_state.shape="),
        ({"blocks": {"chunk": 0}}, "blocks.chunk=0"),
        ({"implementation": "xal"}, "did you mean 'xla'"),
    ],
)
def test_refuses(change, message):
    row = jnp.zeros((1, 3, 4))
    with pytest.raises(ValueError, match=message):
        wkv4(**({"w_d": row[0, 0], "u_d": row[0, 0], "k_btd": row, "v_btd": row} | change))


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_the_kernels_refuse_float64(kernel):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in inputs(1, 3, 4)[:4]]
        with pytest.raises(ValueError, match=f"implementation='{kernel}': .* dtype float64"):
            wkv4(*arrays, implementation=kernel)


def gradients(*arrays, **options):
    def loss(*arrays):
        y, state = wkv4(*arrays, **options)
        return jnp.sum(y) + sum(jnp.sum(part) for part in state)

    return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)


def shapes(b, t, d):
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((d,), (d,), (b, t, d), (b, t, d))]


def test_lowers_for_a_gpu():
    """Chosen by the platform it is lowered for, forward and backward."""
    text = lower_for_gpu(gradients, *shapes(2, 1000, 100))
    assert triton_kernels(text) == ["wkv4", "wkv4_backward"]


@pytest.mark.gpu_compile
def test_compiles_for_a_gpu():
    text = compile_for_gpu(gradients, *shapes(2, 1000, 100)).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, gpu):
    arrays, segments, want = exact(case)
    assert_close(value_and_gradients("gpu", arrays, jnp.float32, segments), want, case)


@pytest.mark.gpu
def test_at_length_on_a_gpu(gpu):
    """With the chunks of the table."""
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(2, 1001, 300)[:4]]
    want = gradients(*arrays, implementation="reference")
    for g, w in zip(gradients(*arrays, implementation="gpu"), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4 * np.abs(w).max())


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", TPUS)
def test_compiles_for_tpus(generation):
    """Chosen by the platform it is lowered for, forward and backward."""
    mesh = topology_mesh(generation, (1,), ("data",))
    for size in ((2, 1000, 2560), (1, 77, 100)):
        text = compile_for_tpu(gradients, mesh, *shapes(*size)).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2
        assert "wkv4_backward" in text


@pytest.mark.tpu_compile
def test_a_chunk_that_does_not_fit_fails():
    run = functools.partial(gradients, blocks=dict(chunk=8192))
    mesh = topology_mesh("v5e", (1,), ("data",))
    with pytest.raises(Exception, match="(?i)vmem|resource_exhausted"):
        compile_for_tpu(run, mesh, *shapes(1, 8192, 1024))
