"""Every implementation against the reference in float64; the reference against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.attention import attention
from pallas_kernels.flash_attention import flash_attention, xla
from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.mask import Mask
from tests.layers.test_attention import CASES as SMALL
from tests.layers.test_attention import inputs, reference
from tests.pallas_kernels.conftest import (
    interpreted,
)

MASK = {field.name for field in dataclasses.fields(Mask)}


def attend(q, k, v, *, function=flash_attention, **options):
    """``function`` with those of ``options`` that are a mask's fields as its `Mask`."""
    mask = Mask(**{name: value for name, value in options.items() if name in MASK})
    rest = {name: value for name, value in options.items() if name not in MASK}
    return function(q, k, v, mask, **rest)


SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)


def packed(b, t):
    """Segments of one token, of a few and of many; positions restart, the last third is padding."""
    ids = np.zeros((b, t), np.int32)
    ids[:, 1:] = 1
    ids[:, t // 3 :] = 2
    positions = np.zeros((b, t), np.int32)
    for segment in range(3):
        inside = ids == segment
        positions[inside] = np.tile(np.arange(inside[0].sum()), b)
    ids[:, 2 * t // 3 :], positions[:, 2 * t // 3 :] = 3, -1
    return dict(
        q_segments_bt=ids, k_segments_bs=ids, q_positions_bt=positions, k_positions_bs=positions
    )


def images(t):
    """``until`` of images of 7 tokens, every other seven; the others see no further than before."""
    first = np.arange(t) // 7 * 7
    return np.where(first // 7 % 2 == 0, first + 6, -1)[None].astype(np.int32)


# name: (batch, t, s, query heads, key heads, channels, options)
CASES = {
    "causal": (2, 300, 300, 4, 4, 16, {}),
    "one token": (1, 1, 1, 4, 2, 8, {}),
    "primes, 8:1 heads": (1, 263, 131, 8, 1, 7, dict(causal=False)),
    "window": (1, 401, 401, 4, 2, 8, dict(window=37)),
    "window both ways": (1, 300, 300, 4, 2, 8, dict(window=129, causal=False)),
    "window past the end": (1, 140, 140, 4, 2, 8, dict(window=5000)),
    "packed": (2, 301, 301, 4, 2, 8, packed(2, 301)),
    "packed, everything": (
        1, 300, 300, 4, 1, 8,
        dict(packed(1, 300), window=60, alibi_slopes_h=SLOPES, soft_cap=3.0, scale=0.4,
             sinks_h=np.array([1.0, -2.0, 0.0, 5.0], np.float32), until_bt=images(300)),
    ),
    "a prefix of blocks": (
        1, 300, 300, 4, 2, 8,
        dict(until_bt=np.where(np.arange(300) < 150, 149, 0)[None].astype(np.int32)),
    ),
    "a chunk of a longer sequence": (
        2, 5, 290, 4, 2, 8, dict(q_positions_bt=np.arange(100, 105)[None]),
    ),
    "alibi both ways": (1, 150, 280, 4, 4, 8, dict(alibi_slopes_h=SLOPES, causal=False)),
    "nothing to see": (1, 130, 130, 4, 2, 8, dict(k_positions_bs=np.full((1, 130), -1))),
    "nothing but sinks": (
        1, 130, 130, 4, 2, 8,
        dict(k_positions_bs=np.full((1, 130), -1), sinks_h=np.array([1.0, -2, 0, 5], np.float32)),
    ),
}  # fmt: skip


def arrays(case, dtype=np.float32, size=1.0):
    b, t, s, h, k, c, options = CASES[case]
    rng = np.random.default_rng(0)
    shapes = ((b, t, h, c), (b, s, k, c), (b, s, k, c), (b, t, h, c))
    return [(rng.normal(size=shape) * size).astype(dtype) for shape in shapes], options


def value_and_gradients(operands, options, implementation, blocks=None):
    """``(y, lse)`` and the gradients of q, k, v and sinks, of a sum that weighs both results."""
    *qkv, dy = (jnp.asarray(a) for a in operands)
    options = dict(options)
    sinks = options.pop("sinks_h", None)
    sinks = None if sinks is None else jnp.asarray(sinks, dy.dtype)

    @jax.jit
    def run(qkv, sinks):
        def weighed(qkv, sinks):
            y, lse = attend(
                *qkv, **options, sinks_h=sinks, return_lse=True,
                implementation=implementation, blocks=blocks,
            )  # fmt: skip
            seen = lse > -1e29
            total = jnp.sum(y * dy) + jnp.sum(jnp.sin(jnp.where(seen, lse, 0)))
            return total, (y, lse)

        return jax.grad(weighed, argnums=(0, 1), has_aux=True)(qkv, sinks)

    gradients, results = run(tuple(qkv), sinks)
    return jax.tree.map(np.asarray, (results, gradients))


@functools.cache
def exact(case, size=1.0):
    with jax.enable_x64(True):
        operands, options = arrays(case, np.float32, size)
        operands = [a.astype(np.float64) for a in operands]
        return value_and_gradients(operands, options, "reference")


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", SMALL)
def test_reference_is_the_equation(case):
    qkv, (q_positions, k_positions), segments, options = inputs(case)
    want = reference(
        *(a.astype(np.float64) for a in qkv),
        q_positions, k_positions, segments, segments, **options,
    )  # fmt: skip
    names = {"slopes": "alibi_slopes_h", "sinks": "sinks_h", "until": "until_bt"}
    options = {names.get(name, name): value for name, value in options.items()}
    options |= dict(q_positions_bt=q_positions, k_positions_bs=k_positions)
    options |= dict(q_segments_bt=segments, k_segments_bs=segments)
    with jax.enable_x64(True):
        qkv = [jnp.asarray(a, jnp.float64) for a in qkv]
        got = attend(*qkv, **options, implementation="reference")
        layers = attend(*qkv, **options, function=attention)
        assert got.dtype == layers.dtype == jnp.float64
        np.testing.assert_allclose(got, want, atol=1e-6 if "alibi_slopes_h" in options else 1e-12)
        np.testing.assert_allclose(layers, got, atol=1e-12)


# interpreting is slow: those that differ in what the kernels do
INTERPRETED = ("primes, 8:1 heads", "window both ways", "packed, everything", "nothing but sinks")


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *((case, "xla") for case in CASES),
        *((case, kernel) for kernel in ("tpu", "gpu") for case in INTERPRETED),
    ],
)
def test_value_and_gradients(case, implementation):
    blocks = dict(query=128, key=128) if implementation == "tpu" else dict(query=64, key=32)
    with interpreted(implementation):
        got = value_and_gradients(*arrays(case), implementation, blocks)
    assert_close(got, exact(case), 2e-5)
    assert not np.any(got[0][0]) or "nothing" not in case


def test_the_tpu_kernels_race_with_no_copy():
    with interpreted("tpu", races=True):
        got = value_and_gradients(*arrays("window"), "tpu", dict(query=128, key=256))
    assert_close(got, exact("window"), 2e-5)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("xla", "bfloat16"), ("tpu", "bfloat16"), ("gpu", "bfloat16"), ("gpu", "float16")],
)
def test_short_floats(implementation, dtype):
    operands, options = arrays("causal")
    with interpreted(implementation):
        got = value_and_gradients(
            [jnp.asarray(a, dtype) for a in operands], options, implementation
        )
    (y, lse), (gradients, _) = got
    assert y.dtype == gradients[0].dtype == dtype and lse.dtype == np.float32
    assert_close(got, exact("causal"), 6e-2 if dtype == "bfloat16" else 1e-2)


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_extreme_logits(implementation):
    """Scores of ±1e4 and beyond: float32 has them to 1e-3, so that is what weights are good for."""
    size = 100.0
    operands, options = arrays("causal", size=size)
    with interpreted(implementation):
        got = value_and_gradients(operands, options, implementation, dict(query=128, key=128))
    want = exact("causal", size)
    assert np.abs(want[0][1]).max() > 1e4
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))
    np.testing.assert_allclose(got[0][0], want[0][0], atol=1e-2 * size)
    np.testing.assert_allclose(got[0][1], want[0][1], rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu", "gpu"])
def test_nan_is_not_hidden(implementation):
    """A query of NaN has a result of NaN; the others do not."""
    q, k, v = (jnp.ones((1, 16, 2, 8)) for _ in range(3))
    with interpreted(implementation):
        y = attend(q.at[0, 3, 1].set(jnp.nan), k, v, implementation=implementation)
    assert jnp.isnan(y[0, 3, 1]).all() and jnp.isnan(y).sum() == 8


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_shape(data):
    b, t, s = (data.draw(st.integers(1, n)) for n in (3, 40, 40))
    k, g, c = (data.draw(st.integers(1, n)) for n in (3, 3, 5))
    blocks = {name: data.draw(st.integers(1, 24)) for name in ("query", "key")}
    window = data.draw(st.none() | st.integers(1, 50))
    causal = data.draw(st.booleans())
    offset = data.draw(st.integers(-5, 45))
    options = dict(causal=causal, window=window, q_positions_bt=np.arange(t)[None] + max(offset, 0))
    if causal and data.draw(st.booleans()):
        options["until_bt"] = np.arange(t)[None] // 4 * 4 + max(offset, 0)
    rng = np.random.default_rng(0)
    operands = [
        rng.normal(size=shape).astype(np.float32)
        for shape in ((b, t, k * g, c), (b, s, k, c), (b, s, k, c), (b, t, k * g, c))
    ]
    got = value_and_gradients(operands, options, "xla", blocks)
    assert_close(got, value_and_gradients(operands, options, "reference"), 2e-5)


def test_rows_of_a_batch_taken_in_turns(monkeypatch):
    monkeypatch.setattr("pallas_kernels.flash_attention.xla.SCORES", 1)
    jax.clear_caches()
    got = value_and_gradients(*arrays("packed"), "xla", dict(query=64, key=32))
    assert_close(got, exact("packed"), 2e-5)
    jax.clear_caches()


@pytest.mark.parametrize(
    "causal, t, s, block",
    [
        (True, 256, 256, 64),
        (True, 300, 300, 64),
        (True, 1024, 1024, 256),
        (True, 4096, 4096, 512),
        # too short, some or one after many, and nothing to skip
        (True, 255, 255, 255),
        (True, 256, 8192, 512),
        (True, 1, 2048, 512),
        (False, 256, 256, 256),
    ],
)
def test_short_causal_calls_are_cut_into_quarters(causal, t, s, block):
    spec = Spec.of(Mask(causal=causal), 1, None, None)
    plan = xla._plan(spec, {"query": 512, "key": 512}, 1, t, 1, s)
    assert (plan.query, plan.key) == (min(block, t), min(block, s))


def temporary_bytes(t, implementation):
    def run(q, k, v):
        return jax.grad(
            lambda q: flash_attention(q, k, v, implementation=implementation).sum()
        )(q)  # fmt: skip

    a = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
    return jax.jit(run).lower(a, a, a).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square():
    lean = [temporary_bytes(t, "xla") for t in (4096, 8192, 16384)]
    assert lean[2] - lean[1] == pytest.approx(2 * (lean[1] - lean[0]), rel=0.2)
    naive = [temporary_bytes(t, "reference") for t in (4096, 8192)]
    assert naive[1] > 3.5 * naive[0] and naive[0] > 10 * lean[0]


def test_refuses():
    q, k = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 9, 2, 16))
    for change, message in (
        (dict(q=q[0]), r"q.shape=\(8, 4, 16\): must be \[batch, time, heads, channels\]"),
        (dict(q=q[:, :, :3]), "num_heads=3: must be a multiple of num_kv_heads=2"),
        (dict(q=q[:, :0]), r"q.shape=\(2, 0, 4, 16\): no size may be 0"),
        (dict(k=k[:1]), r"k.shape=\(1, 9, 2, 16\): must be \(2, 9, 2, 16\)"),
        (dict(v=k[:, :5]), r"v.shape=\(2, 5, 2, 16\): must be \(2, 9, 2, 16\)"),
        (dict(v=k.astype(jnp.bfloat16)), "v.dtype='bfloat16': must be q's, float32"),
        (dict(q=q.astype(jnp.int32)), "q.dtype='int32': must be a floating type"),
        (dict(window=0), "window=0: must be > 0"),
        (dict(soft_cap=-1.0), "soft_cap=-1.0: must be > 0"),
        (dict(sinks_h=jnp.zeros(3)), r"sinks.shape=\(3,\): must be \(4,\)"),
        (dict(alibi_slopes_h=np.zeros(2)), r"alibi_slopes.shape=\(2,\): must be \(4,\)"),
        (dict(q_positions_bt=np.zeros((2, 7), int)), r"q_positions.shape=\(2, 7\): must be"),
        (dict(q_positions_bt=np.zeros((2, 8))), "q_positions.dtype='float.*': must be an integer"),
        (dict(k_segments_bs=np.zeros((2, 9), int)), "segments='one of two'"),
        (dict(until_bt=np.zeros((2, 9), int)), r"until.shape=\(2, 9\): must be"),
        (dict(until_bt=np.zeros((2, 8), int), causal=False), "until='given': changes nothing"),
        (dict(implementation="tpus"), r"implementation='tpus': must be .*did you mean 'tpu'"),
        (dict(implementation="xla", blocks=dict(rows=3)), "blocks.rows=3: no such size"),
        (dict(implementation="xla", blocks=dict(key=0)), "blocks.key=0: must be > 0"),
    ):
        arguments = dict(q=q, k=k, v=k) | change
        operands = [arguments.pop(name) for name in "qkv"]
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            attend(*operands, **arguments)
        assert "\n" not in str(caught.value)
    half = q.astype(jnp.float16)
    with pytest.raises(ValueError, match="implementation='tpu': .* dtype float16: must be bf"):
        flash_attention(half, half, half, implementation="tpu")
    wide = jnp.zeros((1, 8, 1, 512))
    for kernel in ("tpu", "gpu"):
        with pytest.raises(
            ValueError, match=f"implementation='{kernel}': .* 512 channels per head"
        ):
            flash_attention(wide, wide, wide, implementation=kernel)
    with jax.enable_x64(True):
        double = jnp.zeros((1, 8, 1, 16), jnp.float64)
        with pytest.raises(ValueError, match="implementation='gpu': .* dtype float64"):
            flash_attention(double, double, double, implementation="gpu")
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        jax.jit(functools.partial(flash_attention, implementation="tpu"))(q, q, q)
