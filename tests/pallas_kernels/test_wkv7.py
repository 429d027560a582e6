"""`wkv7` against float64, against the equation in torch, and its memory and its refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.wkv import wkv7
from tests.pallas_kernels.conftest import (
    TPUS,
    compile_for_gpu,
    compile_for_tpu,
    interpreted,
    lower_for_gpu,
    topology_mesh,
    triton_kernels,
)


def inputs(b, t, h, c, decay=0.0, seed=0):
    """r, w, k, v, a, b and the state as RWKV-7 makes them: ``a = −κ``, ``b = κ · rate``."""
    rng = np.random.default_rng(seed)
    r, w, k, v, key = rng.normal(size=(5, b, t, h, c))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    rate = rng.uniform(size=key.shape)
    return r, w + decay, k, v, -key, key * rate, rng.normal(size=(b, h, c, c))


def value_and_gradients(implementation, arrays, dtype, segments=None):
    def loss(*arrays):
        y, final = wkv7(
            *arrays[:6], segment_ids_bt=segments, initial_state_bhcc=arrays[6],
            implementation=implementation, blocks={"chunk": 4},
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final)), (y, final)

    run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(7)), has_aux=True))
    (_, results), gradients = run(*(jnp.asarray(x, dtype) for x in arrays))
    return [np.asarray(x, np.float64) for x in (*results, *gradients)]


# length 1, primes, a decay that forgets at once and one that hardly forgets
CASES = {
    "one token": (1, 1, 1, 1, 0, False),
    "packed": (2, 13, 2, 4, 0, True),
    "forgets": (1, 16, 1, 8, 4, False),
    "remembers": (1, 11, 3, 4, -9, True),
}


@functools.cache
def exact(case):
    b, t, h, c, decay, packed = CASES[case]
    arrays = inputs(b, t, h, c, decay)
    segments = np.cumsum(np.random.default_rng(1).uniform(size=(b, t)) < 0.4, 1) if packed else None
    with jax.enable_x64(True):
        return arrays, segments, value_and_gradients("reference", arrays, jnp.float64, segments)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        *((name, case) for name in ("xla", "tpu") for case in CASES),
        *(("gpu", case) for case in ("one token", "forgets", "remembers")),
    ],
)
def test_equals_float64(implementation, case):
    arrays, segments, want = exact(case)
    with interpreted(implementation):
        got = value_and_gradients(implementation, arrays, jnp.float32, segments)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


def test_the_tpu_kernels_do_not_race():
    arrays, segments, want = exact("packed")
    with interpreted("tpu", races=True):
        got = value_and_gradients("tpu", arrays, jnp.float32, segments)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


def test_equals_the_equation_in_torch():
    """The paper's matrices as they are written, and torch's gradients through them."""
    torch = pytest.importorskip("torch")
    arrays = inputs(2, 6, 2, 3)
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    r, w, k, v, a, b, state = leaves
    outputs = []
    for t in range(6):
        change = torch.diag_embed(torch.exp(-torch.exp(w[:, t])))
        change = change + a[:, t, :, :, None] @ b[:, t, :, None, :]
        state = state @ change + v[:, t, :, :, None] @ k[:, t, :, None, :]
        outputs.append((r[:, t, :, None, :] @ state.mT)[..., 0, :])
    y = torch.stack(outputs, 1)
    (torch.sin(y).sum() + torch.cos(state).sum()).backward()
    want = [y.detach(), state.detach(), *(x.grad for x in leaves)]
    with jax.enable_x64(True):
        got = value_and_gradients("reference", arrays, jnp.float64)
    for g, e in zip(got, want, strict=True):
        np.testing.assert_allclose(g, e.numpy(), rtol=1e-9, atol=1e-9)


def test_memory_grows_with_chunks():
    """Eight times the length: states of all tokens would be 8 times as much as here."""

    def bytes_of(t, implementation):
        def loss(*arrays):
            y, _ = wkv7(*arrays, implementation=implementation, blocks={"chunk": 16})
            return jnp.sum(y)

        shapes = [jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)] * 6
        compiled = jax.jit(jax.grad(loss, argnums=tuple(range(6)))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(1024, "xla") < 9 * bytes_of(128, "xla")
    assert bytes_of(1024, "xla") < bytes_of(1024, "reference") / 2


@settings(max_examples=8, deadline=None)
@given(b=st.integers(1, 3), t=st.integers(1, 20), chunk=st.integers(1, 24), data=st.data())
def test_any_shape(b, t, chunk, data):
    """Chunks that divide the length, do not, and are longer than it."""
    row = st.lists(st.integers(0, 1), min_size=t, max_size=t)
    segments = jnp.array(data.draw(st.lists(row, min_size=b, max_size=b)))
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(b, t, 2, 3)[:6]]
    want = wkv7(*arrays, segment_ids_bt=segments, implementation="reference")
    got = wkv7(*arrays, segment_ids_bt=segments, blocks={"chunk": chunk})
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_bfloat16():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(1, 7, 2, 4)[:6]]
    y, final = wkv7(*arrays)
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    want, _ = wkv7(*(x.astype(jnp.float32) for x in arrays), implementation="reference")
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_bthc": jnp.zeros((2, 3))}, "k.shape="),
        ({"r_bthc": jnp.zeros((1, 3, 2, 5))}, "r.shape="),
        ({"w_bthc": jnp.zeros((1, 3, 2, 4), int)}, "w.dtype="),
        ({"segment_ids_bt": jnp.zeros((1, 2), int)}, "segment_ids.shape="),
        ({"initial_state_bhcc": jnp.zeros((1, 2, 4, 3))}, "initial_state.shape="),
        ({"blocks": {"size": 1}}, "blocks.size=1"),
    ],
)
def test_refuses(change, message):
    row = jnp.zeros((1, 3, 2, 4))
    with pytest.raises(ValueError, match=message):
        wkv7(**({f"{name}_bthc": row for name in "rwkvab"} | change))


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_the_kernels_refuse_what_they_cannot_serve(kernel):
    with jax.enable_x64(True):
        arrays = [jnp.zeros((1, 3, 2, 4), jnp.float64)] * 6
        with pytest.raises(ValueError, match=f"implementation='{kernel}': .* dtype float64"):
            wkv7(*arrays, implementation=kernel)
    if kernel == "gpu":
        with pytest.raises(ValueError, match="implementation='gpu': .* 129 channels per head"):
            wkv7(*[jnp.zeros((1, 3, 2, 129))] * 6, implementation=kernel)


def gradients(*arrays, **options):
    def loss(*arrays):
        y, state = wkv7(*arrays, **options)
        return jnp.sum(y) + jnp.sum(state)

    return jax.grad(loss, argnums=tuple(range(6)))(*arrays)


def shapes(*size):
    return [jax.ShapeDtypeStruct(size, jnp.float32)] * 6


def test_lowers_for_a_gpu():
    """Chosen by the platform it is lowered for, forward and backward, where it can serve."""
    text = lower_for_gpu(gradients, *shapes(2, 1000, 3, 64))
    assert triton_kernels(text) == ["wkv7", "wkv7_backward"]
    assert not triton_kernels(lower_for_gpu(wkv7, *shapes(1, 77, 2, 200)))


@pytest.mark.gpu_compile
@pytest.mark.parametrize("c", [64, 128])
def test_compiles_for_a_gpu(c):
    text = compile_for_gpu(gradients, *shapes(2, 1000, 3, c)).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, gpu):
    arrays, segments, want = exact(case)
    got = value_and_gradients("gpu", arrays, jnp.float32, segments)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [64, 128])
def test_at_length_on_a_gpu(c, gpu):
    """With the chunks of the table."""
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(2, 301, 3, c)[:6]]
    want = gradients(*arrays, implementation="reference")
    for g, w in zip(gradients(*arrays, implementation="gpu"), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3 * np.abs(w).max())


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", TPUS)
def test_compiles_for_tpus(generation):
    """Chosen by the platform it is lowered for, forward and backward."""
    mesh = topology_mesh(generation, (1,), ("data",))
    text = compile_for_tpu(gradients, mesh, *shapes(2, 1000, 3, 64)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "wkv7_backward" in text


@pytest.mark.tpu_compile
def test_a_chunk_that_does_not_fit_fails():
    run = functools.partial(gradients, blocks=dict(chunk=4096))
    mesh = topology_mesh("v5e", (1,), ("data",))
    with pytest.raises(Exception, match="(?i)vmem|resource_exhausted"):
        compile_for_tpu(run, mesh, *shapes(1, 4096, 2, 64))
