"""The mixer's state: parallel == token by token == any chunking, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.attention import Attention, AttentionConfig
from layers.cache import KVCache
from layers.config import ConfigError
from layers.context import Context
from layers.rotary import RotaryConfig
from layers.state import CacheConfig, rewind

T, WIDTH = 9, 8
MIXERS = {
    "rotary": (dict(num_kv_heads=2), dict(rotary_config=RotaryConfig())),
    "alibi": (dict(), dict(use_alibi=True)),
    "no positions": (
        dict(num_kv_heads=1, qk_norm=True, sinks=True, soft_cap=1.5, qkv_bias=True), {},
    ),
    "rolling": (
        dict(window=3, num_kv_heads=2), dict(sliding=True, rotary_config=RotaryConfig()),
    ),
    "rolling one": (dict(window=1, sinks=True), dict(sliding=True, use_alibi=True)),
    "window past the end": (dict(window=50), dict(sliding=True, rotary_config=RotaryConfig())),
}  # fmt: skip
# name: (positions, segments); −1 is padding, wherever it stands
ROWS = {
    "plain": ([list(range(T))] * 2, None),
    "packed": (
        [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 7]],
        [[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2, 2, 2]],
    ),
    "ragged": ([[0, 1, 2, -1, -1, 3, 4, -1, 5], [-1, -1, -1, 0, 1, 2, 3, 4, 5]], None),
    "ragged and packed": (
        [[0, 1, 2, -1, 0, 1, 2, 3, -1], [0, 1, -1, -1, 2, 3, 0, 1, -1]],
        [[1, 1, 1, 0, 2, 2, 2, 2, 0], [1, 1, 0, 0, 1, 1, 2, 2, 0]],
    ),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, WIDTH)), jnp.float32)
COTANGENT = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, WIDTH)), jnp.float32)


@functools.cache
def make(name):
    fields, options = MIXERS[name]
    config = AttentionConfig(num_heads=4, **fields)
    layer = Attention(config, WIDTH, rngs=nnx.Rngs(0), **options)
    if layer.sinks is not None:
        layer.sinks.set_value(jnp.array([0.5, -1.0, 2.0, 0.0]))
    return layer


def rows(name):
    positions, segments = ROWS[name]
    positions = jnp.asarray(positions, jnp.int32)
    return positions, None if segments is None else jnp.asarray(segments, jnp.int32)


@jax.jit
def call(layer, x, positions, segments, state):
    y, after = layer(x, Context.of_tokens(positions, segments, state=state))
    return y, after.state


def in_chunks(layer, x, positions, segments, sizes):
    assert sum(sizes) == T
    state, at, ys = layer.init_state(2, T), 0, []
    for n in sizes:
        part = slice(at, at + n)
        held = None if segments is None else segments[:, part]
        y, state = call(layer, x[:, part], positions[:, part], held, state)
        ys.append(y)
        at += n
    return jnp.concatenate(ys, axis=1)


@st.composite
def chunkings(draw):
    """Sizes from a few, so that few shapes compile; together they make every alignment."""
    sizes, left = [], T
    while left:
        sizes.append(draw(st.sampled_from([n for n in (1, 4, T) if n <= left])))
        left -= sizes[-1]
    return sizes


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=25, deadline=None)
@given(sizes=chunkings(), row=st.sampled_from(sorted(ROWS)))
def test_any_chunking_is_the_parallel_form(mixer, sizes, row):
    layer, (positions, segments) = make(mixer), rows(row)
    segments = jnp.zeros_like(positions) if segments is None else segments  # to compile less
    want, _ = call(layer, X, positions, segments, None)
    got = in_chunks(layer, X, positions, segments, sizes)
    np.testing.assert_allclose(got, want, atol=2e-6)


@functools.partial(jax.jit, static_argnames="by_token")
def gradients(layer, x, positions, segments, by_token):
    def f(layer, x):
        if not by_token:
            y, _ = call(layer, x, positions, segments, None)
        else:  # scanned, to compile one step

            def step(state, inputs):
                y, state = call(layer, *(a[:, None] for a in inputs), state)
                return state, y[:, 0]

            tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (x, positions, segments))
            y = jnp.moveaxis(jax.lax.scan(step, layer.init_state(2, T), tokens)[1], 0, 1)
        return jnp.vdot(y, COTANGENT)

    return jax.grad(f, argnums=(0, 1))(layer, x)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_through_the_state_are_the_parallel_forms(mixer):
    """By tokens; in inputs (so through cached keys) and parameters. By chunks: test_mixers.py."""
    layer, (positions, segments) = make(mixer), rows("ragged and packed")
    want = gradients(layer, X, positions, segments, False)
    got = gradients(layer, X, positions, segments, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("mixer", ["rotary", "rolling"])
def test_segments_never_see_each_other(mixer):
    layer, (positions, segments) = make(mixer), rows("packed")
    other = X.at[0, :4].set(X[1, :4] + 3)  # another first document
    a, b = (call(layer, x, positions, segments, None)[0] for x in (X, other))
    np.testing.assert_array_equal(a[0, 4:], b[0, 4:])
    a, b = (in_chunks(layer, x, positions, segments, (4, 4, 1)) for x in (X, other))
    np.testing.assert_array_equal(a[0, 4:], b[0, 4:])


def test_padding_is_neither_written_nor_seen():
    layer, (positions, _) = make("rotary"), rows("ragged")
    noise = jnp.where((positions < 0)[..., None], 1e3, X)
    a, b = (in_chunks(layer, x, positions, None, (4, 4, 1)) for x in (X, noise))
    np.testing.assert_array_equal(a[positions >= 0], b[positions >= 0])
    _, state = call(layer, X, positions, None, layer.init_state(2, T))
    np.testing.assert_array_equal(state.written_b, [6, 6])
    np.testing.assert_array_equal(state.positions_bs, [[0, 1, 2, 3, 4, 5, -1, -1, -1]] * 2)


def test_a_rolling_cache_takes_a_windows_bytes_whatever_the_length():
    layer = make("rolling")
    sizes = [sum(a.nbytes for a in jax.tree.leaves(layer.init_state(2, n))) for n in (4, 9, 10**6)]
    assert len(set(sizes)) == 1
    assert layer.init_state(2, 10**6).capacity == 3
    state = layer.init_state(2, T)
    shapes = jax.tree.map(jnp.shape, state)
    for t in range(T):
        _, state = call(layer, X[:, t : t + 1], jnp.full((2, 1), t), None, state)
        assert jax.tree.map(jnp.shape, state) == shapes
    np.testing.assert_array_equal(np.sort(state.positions_bs, axis=1), [[6, 7, 8]] * 2)


def test_a_cache_shorter_than_the_window_does_not_roll():
    state = make("window past the end").init_state(1, T)
    assert state.capacity == T and not state.rolling


def test_tokens_past_a_contiguous_cache():
    layer = make("rotary")
    state = layer.init_state(2, 4)
    with pytest.raises(ConfigError, match="^tokens=9: must be at most max_length=4 of the cache$"):
        layer(X, Context.of_tokens(jnp.arange(T)[None], state=state))
    # in pieces, shapes cannot tell: what does not fit is dropped, what was there stays
    _, state = call(layer, X[:, :4], jnp.arange(4)[None], None, state)
    _, after = call(layer, X[:, 4:5], jnp.full((1, 1), 4), None, state)
    np.testing.assert_array_equal(after.keys.codes, state.keys.codes)
    np.testing.assert_array_equal(after.written_b, [5, 5])


@pytest.mark.parametrize("row", ["plain", "ragged and packed"])
def test_what_is_rewound_was_never_written(row):
    layer, (positions, segments) = make("rotary"), rows(row)
    segments = jnp.zeros_like(positions) if segments is None else segments
    _, state = call(layer, X[:, :6], positions[:, :6], segments[:, :6], layer.init_state(2, T))
    written, count = state.written_b, jnp.array([1, 3])
    back = rewind(state, count)
    np.testing.assert_array_equal(back.written_b, written - count)
    # the same tokens without the last ones of each row
    valid = positions[:, :6] >= 0
    rank = jnp.cumsum(valid, axis=1)
    shorter = jnp.where(rank <= (written - count)[:, None], positions[:, :6], -1)
    _, want = call(layer, X[:, :6], shorter, segments[:, :6], layer.init_state(2, T))
    np.testing.assert_array_equal(back.positions_bs, want.positions_bs)
    after = (X[:, 6:], positions[:, 6:], segments[:, 6:])
    got, want = (call(layer, *after, one)[0] for one in (back, want))
    np.testing.assert_array_equal(got, want)
    assert not np.any(rewind(state, jnp.array([9, 9])).written_b)


def test_a_rolling_cache_cannot_be_rewound():
    with pytest.raises(ConfigError, match="^state='rolling KVCache': does not support rewind"):
        rewind(make("rolling").init_state(2, T), jnp.ones(2, int))


def test_refuses_an_empty_cache():
    for sizes, message in (((0, 4), "batch=0"), ((1, 0), "max_length=0")):
        with pytest.raises(ConfigError, match=f"^{message}: must be > 0$"):
            KVCache.empty(*sizes, 1, 1, "float32", rolling=False)


def test_a_bfloat16_cache_serves_float32_attention():
    layer, (positions, _) = make("rotary"), rows("plain")
    state = layer.init_state(2, T, CacheConfig(dtype="bfloat16"))
    y, state = call(layer, X, positions, None, state)
    assert state.keys.codes.dtype == jnp.bfloat16 and y.dtype == jnp.float32
    want, _ = call(layer, X, positions, None, None)
    np.testing.assert_allclose(y, want, atol=3e-2)
