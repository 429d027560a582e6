"""`selective_scan` against float64, against Mamba in torch, and its memory and its refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.exp2 import exp2
from pallas_kernels.selective_scan import selective_scan
from tests.pallas_kernels.conftest import (
    GENERATIONS,
    compile_for_gpu,
    compile_for_tpu,
    interpreted,
    lower_for_gpu,
    topology_mesh,
    triton_kernels,
)


def inputs(b, t, d, n, step=1.0, seed=0):
    """x, Δ, A, B, C, D, z and the state; ``step`` scales Δ."""
    rng = np.random.default_rng(seed)
    x, delta, z = rng.normal(size=(3, b, t, d))
    b_in, c_out = rng.normal(size=(2, b, t, n))
    a = -np.exp(rng.normal(size=(d, n)))
    return x, step * np.logaddexp(0, delta), a, b_in, c_out, rng.normal(size=d), z, rng.normal(
        size=(b, d, n)
    )  # fmt: skip


def segments(b, t, packed):
    changes = np.random.default_rng(1).uniform(size=(b, t)) < 0.3
    return np.cumsum(changes, axis=1) if packed else None


def value_and_gradients(implementation, arrays, dtype, segment_ids=None, **blocks):
    def loss(*arrays):
        y, final = selective_scan(
            *arrays[:7], initial_state_bdn=arrays[7], segment_ids_bt=segment_ids,
            implementation=implementation, blocks=blocks or None,
        )  # fmt: skip
        # gradients into every result, no two alike
        weigh = (jnp.sum(jnp.cos(jnp.arange(a.size)).reshape(a.shape) * a) for a in (y, final))
        return sum(weigh), (y, final)

    run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(8)), has_aux=True))
    (_, results), gradients = run(*(jnp.asarray(a, dtype) for a in arrays))
    return [np.asarray(a, np.float64) for a in (*results, *gradients)]


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def recurrence(x, delta, a, b_in, c_out, skip, z, state, segment_ids):
    """Gu & Dao 2023, eq. 2, in NumPy: one number of the state at a time."""
    y = np.zeros_like(x)
    state = state.copy()
    for row, t, d in np.ndindex(x.shape):
        if segment_ids is not None and t and segment_ids[row, t] != segment_ids[row, t - 1]:
            state[row, d] = 0
        decay = np.exp(delta[row, t, d] * a[d])
        state[row, d] = decay * state[row, d] + delta[row, t, d] * x[row, t, d] * b_in[row, t]
        y[row, t, d] = state[row, d] @ c_out[row, t] + skip[d] * x[row, t, d]
    return y * z / (1 + np.exp(-z)), state


# length 1, a prime, segments of one token, states that fade at once and that hardly fade
CASES = {
    "one token": (2, 1, 3, 2, 1.0, False),
    "prime": (2, 13, 5, 3, 1.0, False),
    "packed": (2, 13, 5, 3, 1.0, True),
    "forgets": (1, 9, 4, 2, 60.0, False),
    "remembers": (1, 11, 4, 2, 1e-4, True),
    "many channels": (1, 9, 300, 4, 1.0, True),
}


@functools.cache
def exact(case):
    b, t, d, n, step, packed = CASES[case]
    arrays, ids = inputs(b, t, d, n, step), segments(b, t, packed)
    with jax.enable_x64(True):
        return arrays, ids, value_and_gradients("reference", arrays, jnp.float64, ids)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_recurrence(case):
    arrays, ids, (y, final, *_) = exact(case)
    want_y, want_final = recurrence(*arrays, ids)
    np.testing.assert_allclose(y, want_y, atol=1e-12)
    np.testing.assert_allclose(final, want_final, atol=1e-12)


@pytest.mark.parametrize(
    ("implementation", "case", "chunk"),
    [
        *((name, case, 4) for name in ("xla", "tpu") for case in CASES),
        *(("gpu", case, 4) for case in ("one token", "forgets", "many channels")),
        ("gpu", "packed", 7),
    ],
)
def test_equals_float64(implementation, case, chunk):
    arrays, ids, want = exact(case)
    with interpreted(implementation):
        got = value_and_gradients(implementation, arrays, jnp.float32, ids, chunk=chunk, rows=2)
    assert all(np.isfinite(a).all() for a in got)
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("case", ["packed", "many channels"])
def test_the_tpu_kernels_do_not_race(case):
    arrays, ids, want = exact(case)
    with interpreted("tpu", races=True):
        got = value_and_gradients("tpu", arrays, jnp.float32, ids, chunk=4, rows=2)
    assert_close(got, want, 2e-5)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_shape(data):
    b, t, d, n, chunk = (data.draw(st.integers(1, most)) for most in (3, 40, 9, 5, 50))
    arrays, ids = inputs(b, t, d, n), segments(b, t, data.draw(st.booleans()))
    got = value_and_gradients("xla", arrays, jnp.float32, ids, chunk=chunk)
    assert_close(got, value_and_gradients("reference", arrays, jnp.float32, ids), 2e-5)


def test_is_the_scan_of_transformers_mamba():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=6, state_size=4, expand=2, time_step_rank=3)
    mixer = MambaMixer(config, 0).eval()
    seen = {}
    mixer.out_proj.register_forward_hook(lambda module, given, y: seen.update(gated=given[0]))
    mixer.in_proj.register_forward_hook(lambda module, given, y: seen.update(both=y))
    mixer.x_proj.register_forward_hook(lambda module, given, y: seen.update(x=given[0], out=y))
    with torch.no_grad():
        mixer(torch.randn(2, 7, 6))
    held = {name: value.detach().numpy() for name, value in seen.items()}
    _, b_in, c_out = np.split(held["out"], [3, 7], axis=-1)
    step = held["out"][..., :3] @ mixer.dt_proj.weight.detach().numpy().T
    y, _ = selective_scan(
        *map(jnp.asarray, (held["x"], step, -np.exp(mixer.A_log.detach().numpy()), b_in, c_out)),
        jnp.asarray(mixer.D.detach().numpy()),
        jnp.asarray(held["both"][..., 12:]),
        delta_bias_d=jnp.asarray(mixer.dt_proj.bias.detach().numpy()),
        delta_softplus=True,
    )
    np.testing.assert_allclose(y, held["gated"], atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_goes_on_where_it_stopped(implementation):
    arrays = [jnp.asarray(a, jnp.float32) for a in inputs(2, 13, 5, 3)]
    run = functools.partial(selective_scan, implementation=implementation, blocks={"chunk": 4})
    want, end = run(*arrays[:7], initial_state_bdn=arrays[7])
    state, parts = arrays[7], []
    for at, to in ((0, 5), (5, 6), (6, 13)):
        x, delta, b_in, c_out, z = (arrays[i][:, at:to] for i in (0, 1, 3, 4, 6))
        part, state = run(x, delta, arrays[2], b_in, c_out, arrays[5], z, initial_state_bdn=state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-5)
    np.testing.assert_allclose(state, end, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_bfloat16_is_computed_in_float32(implementation):
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in inputs(1, 9, 4, 2)[:7]]
    want, _ = selective_scan(*(a.astype(jnp.float32) for a in arrays))
    with interpreted(implementation):
        y, state = selective_scan(*arrays, implementation=implementation)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-2, atol=1e-6)


def temporary_bytes(t, implementation):
    def loss(*arrays):
        return jnp.sum(selective_scan(*arrays, implementation=implementation)[0])

    b, d, n = 1, 32, 16
    shapes = ((b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_all_states():
    small, middle, large = (temporary_bytes(t, "xla") for t in (2048, 4096, 8192))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.2)
    # less than half of the states themselves, of which the reference keeps several
    assert large < 8192 * 32 * 16 * 4 / 2 < temporary_bytes(8192, "reference")


def test_exp2_is_exact_to_the_last_bits():
    x = np.linspace(-126, 127.9, 100_001, dtype=np.float32)
    want = np.exp2(x.astype(np.float64))
    np.testing.assert_allclose(np.asarray(exp2(jnp.asarray(x)), np.float64), want, rtol=1.5e-7)
    ends = exp2(jnp.array([-np.inf, -1e9, 0.0, 1.0, 128.0, np.inf, np.nan], jnp.float32))
    np.testing.assert_array_equal(ends, [2.0**-126, 2.0**-126, 1, 2, np.inf, np.inf, np.nan])
    with jax.enable_x64(True):
        assert exp2(jnp.float64(0.3)) == np.exp2(0.3)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_btd=jnp.zeros((2, 3))), r"x.shape=\(2, 3\): must be \[batch, time, channels\]"),
        (dict(a_dn=jnp.zeros(4)), r"a.shape=\(4,\): must be \[channels, state\]"),
        (dict(delta_btd=jnp.zeros((1, 2, 4))), r"delta.shape=\(1, 2, 4\): must be \(1, 3, 4\)"),
        (dict(b_btn=jnp.zeros((1, 3, 5))), r"b.shape=\(1, 3, 5\): must be \(1, 3, 2\)"),
        (dict(c_btn=jnp.zeros((1, 3, 2), int)), "c.dtype='int32': must be a floating type"),
        (dict(d_d=jnp.zeros(3)), r"d.shape=\(3,\): must be \(4,\)"),
        (dict(z_btd=jnp.zeros((1, 3, 3))), r"z.shape=\(1, 3, 3\): must be \(1, 3, 4\)"),
        (dict(delta_bias_d=jnp.zeros(1)), r"delta_bias.shape=\(1,\): must be \(4,\)"),
        (dict(initial_state_bdn=jnp.zeros((1, 4, 3))), "initial_state.shape="),
        (dict(segment_ids_bt=jnp.zeros((1, 3))), "segment_ids.dtype='float32': must be an integer"),
        (dict(blocks={"chunk": 0}), "blocks.chunk=0: must be > 0"),
        (dict(x_btd=jnp.zeros((1, 0, 4))), "x.shape=.*no size may be 0"),
    ],
)  # fmt: skip
def test_refuses(change, message):
    arguments = dict(
        x_btd=jnp.zeros((1, 3, 4)), delta_btd=jnp.zeros((1, 3, 4)), a_dn=jnp.zeros((4, 2)),
        b_btn=jnp.zeros((1, 3, 2)), c_btn=jnp.zeros((1, 3, 2)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        selective_scan(**(arguments | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_the_kernels_refuse_what_they_cannot_serve(kernel):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in inputs(1, 3, 4, 2)[:5]]
        with pytest.raises(ValueError, match=f"implementation='{kernel}': .* dtype float64"):
            selective_scan(*arrays, implementation=kernel)
    if kernel == "gpu":
        arrays = [jnp.asarray(a, jnp.float32) for a in inputs(1, 3, 4, 257)[:5]]
        with pytest.raises(ValueError, match="implementation='gpu': .* a state of 257 numbers"):
            selective_scan(*arrays, implementation=kernel)


def gradients(*arrays, **options):
    def loss(*arrays):
        y, state = selective_scan(*arrays, **options)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    return jax.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)


def shapes(b, t, d, n):
    sizes = ((b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n))
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


def test_lowers_for_a_gpu():
    """Chosen by the platform it is lowered for, forward and backward, where it can serve."""
    text = lower_for_gpu(gradients, *shapes(2, 1000, 1536, 16))
    assert triton_kernels(text) == ["selective_scan", "selective_scan_backward"]
    assert not triton_kernels(lower_for_gpu(selective_scan, *shapes(1, 77, 100, 300)))


@pytest.mark.gpu_compile
@pytest.mark.parametrize("n", [16, 256])
def test_compiles_for_a_gpu(n):
    text = compile_for_gpu(gradients, *shapes(2, 1000, 100, n)).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, gpu):
    arrays, ids, want = exact(case)
    for chunk in (4, 7, 32):
        got = value_and_gradients("gpu", arrays, jnp.float32, ids, chunk=chunk)
        assert_close(got, want, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16, 64, 256])
def test_at_length_on_a_gpu(n, gpu):
    arrays, ids = inputs(2, 1001, 300, n), segments(2, 1001, True)
    want = value_and_gradients("reference", arrays, jnp.float32, ids)
    assert_close(value_and_gradients("gpu", arrays, jnp.float32, ids), want, 1e-4)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_for_tpus(generation):
    """Chosen by the platform it is lowered for, forward and backward."""
    mesh = topology_mesh(generation, (1,), ("data",))
    for size in ((2, 1000, 1536, 16), (1, 77, 100, 128)):
        text = compile_for_tpu(gradients, mesh, *shapes(*size)).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2
        assert "selective_scan_backward" in text


@pytest.mark.tpu_compile
def test_a_chunk_that_does_not_fit_fails():
    run = functools.partial(gradients, blocks=dict(chunk=1024))
    mesh = topology_mesh("v5e", (1,), ("data",))
    with pytest.raises(Exception, match="(?i)vmem|resource_exhausted"):
        compile_for_tpu(run, mesh, *shapes(1, 2048, 1024, 64))
