"""`ssd` against float64, against Mamba-2 in torch, and its memory and its refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from tests.pallas_kernels.conftest import compile_for_tpu, lower_for_gpu, topology_mesh


def inputs(b, t, h, p, g, n, step=1.0, seed=0):
    """x, Δ, A, B, C, D and the state; ``step`` scales Δ."""
    rng = np.random.default_rng(seed)
    b_in, c_out = rng.normal(size=(2, b, t, g, n))
    return (
        rng.normal(size=(b, t, h, p)), step * np.logaddexp(0, rng.normal(size=(b, t, h))),
        -np.exp(rng.normal(size=h)), b_in, c_out, rng.normal(size=h), rng.normal(size=(b, h, p, n)),
    )  # fmt: skip


def segments(b, t, packed):
    changes = np.random.default_rng(1).uniform(size=(b, t)) < 0.3
    return np.cumsum(changes, axis=1) if packed else None


def value_and_gradients(implementation, arrays, dtype, segment_ids=None, **blocks):
    def loss(*arrays):
        y, final = ssd(
            *arrays[:6], initial_state_bhpn=arrays[6], segment_ids_bt=segment_ids,
            implementation=implementation, blocks=blocks or None,
        )  # fmt: skip
        # gradients into every result, no two alike
        weigh = (jnp.sum(jnp.cos(jnp.arange(a.size)).reshape(a.shape) * a) for a in (y, final))
        return sum(weigh), (y, final)

    run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(7)), has_aux=True))
    (_, results), gradients = run(*(jnp.asarray(a, dtype) for a in arrays))
    return [np.asarray(a, np.float64) for a in (*results, *gradients)]


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def recurrence(x, delta, a, b_in, c_out, skip, state, segment_ids):
    """Dao & Gu 2024, §2.1 with a decay a head, in NumPy: a head at a time."""
    y = np.zeros_like(x)
    state = state.copy()
    per_group = x.shape[2] // b_in.shape[2]
    for row, t, h in np.ndindex(x.shape[:3]):
        if segment_ids is not None and t and segment_ids[row, t] != segment_ids[row, t - 1]:
            state[row, h] = 0
        step, g = delta[row, t, h], h // per_group
        inflow = np.outer(step * x[row, t, h], b_in[row, t, g])
        state[row, h] = np.exp(step * a[h]) * state[row, h] + inflow
        y[row, t, h] = state[row, h] @ c_out[row, t, g] + skip[h] * x[row, t, h]
    return y, state


# length 1, primes, segments of one token, 8:1 heads, states that fade at once and that hardly fade
CASES = {
    "one token": (2, 1, 3, 2, 1, 4, 1.0, False),
    "a group a head": (2, 13, 4, 3, 4, 5, 1.0, False),
    "packed, 8:1 heads": (2, 37, 8, 3, 1, 5, 1.0, True),
    "forgets": (1, 23, 4, 2, 2, 3, 60.0, False),
    "remembers": (1, 29, 2, 2, 1, 3, 1e-4, True),
    "forgets, then remembers": (1, 40, 2, 3, 1, 2, 1.0, False),
}


@functools.cache
def exact(case):
    b, t, h, p, g, n, step, packed = CASES[case]
    arrays, ids = inputs(b, t, h, p, g, n, step), segments(b, t, packed)
    if case == "forgets, then remembers":
        # a chunk whose logarithms reach −500: their sums must not round the decays after them
        arrays[1][:] = np.where(np.arange(t) % 16 < 8, 40.0, 1e-3)[None, :, None]
        arrays[2][:] = -1.7
    with jax.enable_x64(True):
        return arrays, ids, value_and_gradients("reference", arrays, jnp.float64, ids)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_recurrence(case):
    arrays, ids, (y, final, *_) = exact(case)
    want_y, want_final = recurrence(*arrays, ids)
    np.testing.assert_allclose(y, want_y, atol=1e-12)
    np.testing.assert_allclose(final, want_final, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [*((case, "float32", 2e-5) for case in CASES), ("packed, 8:1 heads", "float64", 1e-12)],
)
def test_equals_float64(case, dtype, tolerance):
    arrays, ids, want = exact(case)
    with jax.enable_x64(dtype == "float64"):
        got = value_and_gradients("xla", arrays, jnp.dtype(dtype), ids, chunk=16)
    assert all(np.isfinite(a).all() for a in got)
    assert_close(got, want, tolerance)


@settings(max_examples=3, deadline=None)
@given(st.data())
def test_any_shape(data):
    b, t, p, g, r, n, chunk = (data.draw(st.integers(1, m)) for m in (3, 40, 5, 3, 3, 5, 50))
    arrays, ids = inputs(b, t, g * r, p, g, n), segments(b, t, data.draw(st.booleans()))
    got = value_and_gradients("xla", arrays, jnp.float32, ids, chunk=chunk)
    assert_close(got, value_and_gradients("reference", arrays, jnp.float32, ids), 2e-5)


def test_a_decay_a_head_is_the_selective_scan():
    """Mamba's recurrence with every channel of a head and every number of its state alike."""
    b, t, h, p, n = 2, 19, 3, 4, 5
    x, dt, a, b_in, c_out, skip, state = (
        jnp.asarray(array, jnp.float32) for array in inputs(b, t, h, p, 1, n)
    )
    bias = jnp.linspace(-1, 1, h)

    def wide(a_h):
        return jnp.repeat(a_h, p, axis=-1)

    want, end = selective_scan(
        x.reshape(b, t, -1), wide(dt), jnp.tile(wide(a)[:, None], (1, n)), b_in[:, :, 0],
        c_out[:, :, 0], wide(skip), delta_bias_d=wide(bias), delta_softplus=True,
        initial_state_bdn=state.reshape(b, -1, n), implementation="reference",
    )  # fmt: skip
    got, state = ssd(
        x, dt, a, b_in, c_out, skip, dt_bias_h=bias, dt_softplus=True, initial_state_bhpn=state
    )
    np.testing.assert_allclose(got.reshape(b, t, -1), want, atol=1e-5)
    np.testing.assert_allclose(state.reshape(b, -1, n), end, atol=1e-5)


def test_is_the_scan_of_transformers_mamba2():
    torch = pytest.importorskip("torch")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    h, p, g, n = 4, 3, 2, 5
    config = Mamba2Config(
        hidden_size=6, state_size=n, expand=2, num_heads=h, head_dim=p, n_groups=g, chunk_size=4
    )
    mixer = Mamba2Mixer(config, 0).eval()
    seen = {}
    mixer.in_proj.register_forward_hook(lambda module, given, y: seen.update(both=y))
    mixer.norm.register_forward_hook(lambda module, given, y: seen.update(y=given[0]))
    with torch.no_grad():
        mixer(torch.randn(2, 7, 6))
        convolved = mixer.conv1d(seen["both"][..., h * p : -h].mT)[..., :7].mT
        seen["xbc"] = torch.nn.functional.silu(convolved)
    held = {name: value.detach().numpy() for name, value in seen.items()}
    parameters = (mixer.A_log, mixer.D, mixer.dt_bias)
    a_log, skip, bias = (jnp.asarray(a.detach().numpy()) for a in parameters)
    x, b_in, c_out = np.split(held["xbc"], [h * p, h * p + g * n], axis=-1)
    y, _ = ssd(
        jnp.asarray(x.reshape(2, 7, h, p)),
        jnp.asarray(held["both"][..., -h:]),
        -jnp.exp(a_log),
        *(jnp.asarray(a.reshape(2, 7, g, n)) for a in (b_in, c_out)),
        skip,
        dt_bias_h=bias,
        dt_softplus=True,
    )
    np.testing.assert_allclose(y.reshape(2, 7, -1), held["y"], atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_goes_on_where_it_stopped(implementation):
    arrays = [jnp.asarray(a, jnp.float32) for a in inputs(2, 13, 4, 3, 2, 5)]
    run = functools.partial(ssd, implementation=implementation, blocks={"chunk": 4})
    want, end = run(*arrays[:6], initial_state_bhpn=arrays[6])
    state, parts = arrays[6], []
    for at, to in ((0, 5), (5, 6), (6, 13)):
        x, dt, b_in, c_out = (arrays[i][:, at:to] for i in (0, 1, 3, 4))
        part, state = run(x, dt, arrays[2], b_in, c_out, arrays[5], initial_state_bhpn=state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-5)
    np.testing.assert_allclose(state, end, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    arrays, ids = inputs(1, 19, 4, 3, 2, 5), segments(1, 19, True)
    rounded = [jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in arrays]
    want = value_and_gradients("xla", rounded, jnp.float32, ids, chunk=8)
    got = value_and_gradients("xla", arrays, jnp.bfloat16, ids, chunk=8)
    assert_close(got, want, 1e-2)
    y, state = ssd(*(jnp.asarray(a, jnp.bfloat16) for a in arrays[:5]))
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def temporary_bytes(t, implementation):
    def loss(*arrays):
        return jnp.sum(ssd(*arrays, implementation=implementation)[0])

    compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(*shapes(1, t, 4, 16, 1, 32))
    return compiled.compile().memory_analysis().temp_size_in_bytes


def shapes(b, t, h, p, g, n, dtype=jnp.float32):
    sizes = ((b, t, h, p), (b, t, h), (h,), (b, t, g, n), (b, t, g, n))
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def test_memory_grows_with_the_length_and_not_with_all_states():
    small, middle, large = (temporary_bytes(t, "xla") for t in (2048, 4096, 8192))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.2)
    # less than half of the states themselves, of which the reference keeps several
    assert large < 8192 * 4 * 16 * 32 * 4 / 2 < temporary_bytes(8192, "reference")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_bthp=jnp.zeros((2, 3))), r"x.shape=\(2, 3\): must be \[batch, time, heads"),
        (dict(b_btgn=jnp.zeros((1, 3, 2))), r"b.shape=\(1, 3, 2\): must be \[batch, time, groups"),
        (dict(a_h=jnp.zeros(3)), r"a.shape=\(3,\): must be \(4,\)"),
        (dict(dt_bth=jnp.zeros((1, 2, 4))), r"dt.shape=\(1, 2, 4\): must be \(1, 3, 4\)"),
        (dict(b_btgn=jnp.zeros((1, 3, 3, 5))), "num_heads=4: must be a multiple of num_groups=3"),
        (dict(c_btgn=jnp.zeros((1, 3, 2, 5), int)), "c.dtype='int32': must be a floating type"),
        (dict(d_h=jnp.zeros(3)), r"d.shape=\(3,\): must be \(4,\)"),
        (dict(dt_bias_h=jnp.zeros(1)), r"dt_bias.shape=\(1,\): must be \(4,\)"),
        (dict(initial_state_bhpn=jnp.zeros((1, 4, 5, 2))), "initial_state.shape="),
        (dict(segment_ids_bt=jnp.zeros((1, 3))), "segment_ids.dtype='float32': must be an integer"),
        (dict(blocks={"chunk": 0}), "blocks.chunk=0: must be > 0"),
        (dict(implementation="tpu"), "implementation='tpu': ssd does not support .* no TPU ker"),
        (dict(implementation="gpu"), "implementation='gpu': ssd does not support .* no GPU ker"),
        (dict(x_bthp=jnp.zeros((1, 0, 4, 2))), "x.shape=.*no size may be 0"),
    ],
)  # fmt: skip
def test_refuses(change, message):
    arguments = dict(
        x_bthp=jnp.zeros((1, 3, 4, 2)), dt_bth=jnp.zeros((1, 3, 4)), a_h=jnp.zeros(4),
        b_btgn=jnp.zeros((1, 3, 2, 5)), c_btgn=jnp.zeros((1, 3, 2, 5)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        ssd(**(arguments | change))
    assert "\n" not in str(caught.value)


def gradients(*arrays):
    def loss(*arrays):
        y, state = ssd(*arrays)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    return jax.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)


def test_chips_multiply_what_they_are_given():
    """Lowered for a GPU, products of bfloat16 are of bfloat16; for a CPU they are of float32."""
    arrays = shapes(1, 100, 4, 16, 2, 32, jnp.bfloat16)
    text = lower_for_gpu(gradients, *arrays)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("xbf16>) -> tensor<" in line for line in products)
    assert all("xf32>" in line.split(" -> ")[1] for line in products)
    on_cpu = jax.jit(gradients).lower(*arrays).as_text().splitlines()
    assert not any("dot_general" in line and "bf16" in line for line in on_cpu)


@pytest.mark.tpu_compile
def test_compiles_for_a_tpu_and_is_lean_there():
    b, t, h, p, g, n = 2, 4096, 8, 64, 1, 128
    mesh = topology_mesh("v5e", (1,), ("data",))
    compiled = compile_for_tpu(gradients, mesh, *shapes(b, t, h, p, g, n, jnp.bfloat16))
    # less than the decays of all the chunks in bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * b * t * h * 128
