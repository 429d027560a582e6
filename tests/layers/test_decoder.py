"""The stack against an independent float64 NumPy decoder, and against itself in every form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.hooks import Hooks
from layers.mlp import MlpConfig
from layers.rotary import RotaryConfig

V, D, T = 13, 8, 6
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, T)), jnp.int32)
BASE = DecoderConfig(
    vocab_size=V,
    width=D,
    num_layers=4,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=3),
    mlp=MlpConfig(12),
    pattern=("sliding", "attention"),
    init_std=0.5,
)
CONFIGS = {
    "llama": dict(),
    "gemma 2": dict(norm_position="both", embedding_scale=D**0.5, logit_cap=3.0),
    "vaswani": dict(
        norm_position="post", position="sinusoidal", norm="layernorm", norm_bias=True,
        pattern=("attention",), mlp=MlpConfig(12, "relu", True), tie_embeddings=False,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    ),
    "gpt-2": dict(
        position="learned", max_length=T, norm="layernorm", norm_bias=True, norm_eps=1e-5,
        pattern=("attention",), mlp=MlpConfig(12, "gelu_tanh", True),
        attention=AttentionConfig(num_heads=2, qkv_bias=True, out_bias=True),
    ),
    "gpt-j": dict(parallel_residual=True, tie_embeddings=False, norm="layernorm"),
    "parallel, both": dict(parallel_residual=True, norm_position="both", position="none"),
    "gpt-neox": dict(parallel_residual=True, shared_norm=False, norm="layernorm", norm_bias=True),
    "olmo 2": dict(
        norm_position="output", pattern=("attention",),
        attention=AttentionConfig(4, 2, qk_norm=True, qk_norm_across_heads=True),
    ),
    "gemma 3": dict(
        norm="rmsnorm_1p", norm_position="both", rotary=RotaryConfig(50.0),
        sliding_rotary=RotaryConfig(7.0),
        attention=AttentionConfig(4, 2, window=3, qk_norm=True),
    ),
}  # fmt: skip


@functools.cache
def make(name="llama", **changes):
    """A decoder whose every parameter, norms and biases too, is random."""
    config = dataclasses.replace(BASE, **CONFIGS[name], **changes)
    leaves, structure = jax.tree.flatten(Decoder(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    moved = [
        a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype) if a.ndim < 3 else a
        for a in leaves
    ]
    return jax.tree.unflatten(structure, moved)


def with_config(model, **changes):
    """The same parameters under another configuration."""
    other = Decoder(dataclasses.replace(model.config, **changes), rngs=nnx.Rngs(0))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@jax.jit
def logits(model, tokens):
    return model(tokens).logits_btv


@jax.jit
def gradients(model, tokens):
    def loss(model):
        return jnp.mean(jax.nn.logsumexp(model(tokens).logits_btv, axis=-1) ** 2)

    return jax.grad(loss)(model)


def in_numpy(model, tokens):
    """The decoder again, in float64, one position, head and layer at a time."""
    c = model.config

    def array(p, i=None):
        a = np.asarray(p[...], np.float64)
        return a if i is None else a[i]

    def norm(layer, x, i=None):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        scale = array(layer.scale, i) + (c.norm == "rmsnorm_1p")
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale
        return y if layer.bias is None else y + array(layer.bias, i)

    def linear(layer, x, i=None):
        w = array(layer.weight, i)
        y = np.tensordot(x, w, axes=x.ndim - 2 if w.ndim == 3 and x.ndim == 4 else 1)
        return y if layer.bias is None else y + array(layer.bias, i)

    def attend(layer, x, i, window):
        q, k, v = (linear(p, x, i) for p in (layer.query, layer.key, layer.value))
        b, t, h, ch = q.shape
        if c.attention.qk_norm_across_heads:
            # one norm over what the heads hold together
            def across(p, a):
                mean = (a**2).mean((-2, -1), keepdims=True)
                return a / np.sqrt(mean + c.norm_eps) * array(p.scale, i)

            q, k = across(layer.query_norm, q), across(layer.key_norm, k)
        elif c.attention.qk_norm:
            q, k = norm(layer.query_norm, q, i), norm(layer.key_norm, k, i)
        group = h // k.shape[2]
        if c.position == "rotary":
            rotary = c.rotary if window is None else c.sliding_rotary or c.rotary
            theta = rotary.base ** (-np.arange(0, ch, 2) / ch)
            turn = np.exp(1j * np.arange(t)[:, None] * theta)[None, :, None]

            def rotate(a):
                z = (a[..., : ch // 2] + 1j * a[..., ch // 2 :]) * turn
                return np.concatenate((z.real, z.imag), -1)

            q, k = rotate(q), rotate(k)
        y = np.zeros(q.shape)
        for n, head, now in np.ndindex(b, h, t):
            first = 0 if window is None else max(0, now - window + 1)
            s = k[n, first : now + 1, head // group] @ q[n, now, head] / np.sqrt(ch)
            w = np.exp(s - s.max())
            y[n, now, head] = w @ v[n, first : now + 1, head // group] / w.sum()
        out = np.tensordot(y, array(layer.out.weight, i), axes=2)
        return out if layer.out.bias is None else out + array(layer.out.bias, i)

    def act(x):
        if c.mlp.activation == "relu":
            return np.maximum(x, 0)
        if c.mlp.activation == "swiglu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def mlp(layer, x, i):
        h = linear(layer.up, x, i)
        h = act(h) if layer.gate is None else act(linear(layer.gate, x, i)) * h
        return linear(layer.down, h, i)

    x = array(model.embedding.table)[tokens] * (c.embedding_scale or 1)
    t = tokens.shape[1]
    if c.position == "learned":
        x = x + array(model.positions.table)[:t]
    if c.position == "sinusoidal":
        angles = np.arange(t)[:, None] / 10_000.0 ** (np.arange(0, D, 2) / D)
        x[..., 0::2] += np.sin(angles)
        x[..., 1::2] += np.cos(angles)
    for i in range(c.repeats):
        for kind, b in zip(c.pattern, model.blocks, strict=True):
            window = c.attention.window if kind == "sliding" else None
            if c.norm_position == "post":
                x = norm(b.mixer_norm, x + attend(b.mixer, x, i, window), i)
                x = norm(b.mlp_norm, x + mlp(b.mlp, x, i), i)
                continue
            if c.norm_position == "output":
                x = x + norm(b.mixer_post_norm, attend(b.mixer, x, i, window), i)
                x = x + norm(b.mlp_post_norm, mlp(b.mlp, x, i), i)
                continue
            normed = norm(b.mixer_norm, x, i)
            y = attend(b.mixer, normed, i, window)
            if c.norm_position == "both":
                y = norm(b.mixer_post_norm, y, i)
            if c.parallel_residual:
                read = normed if c.shared_norm else norm(b.mlp_norm, x, i)
            else:
                read = norm(b.mlp_norm, x + y, i)
            z = mlp(b.mlp, read, i)
            if c.norm_position == "both":
                z = norm(b.mlp_post_norm, z, i)
            x = x + y + z
    if c.norm_position != "post":
        x = norm(model.final_norm, x)
    head = array(model.embedding.table).T if c.tie_embeddings else array(model.head.weight)
    y = x @ head
    return y if c.logit_cap is None else c.logit_cap * np.tanh(y / c.logit_cap)


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_an_independent_decoder(name):
    model = make(name)
    got = logits(model, TOKENS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, in_numpy(model, np.asarray(TOKENS)), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma 2", "gpt-j"])
def test_scanned_and_unrolled_agree_in_value_and_gradient(name):
    model = make(name)
    unrolled = with_config(model, scan=False)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(model)) == jax.tree.map(
        jnp.shape, jax.tree.leaves(Decoder(unrolled.config, rngs=nnx.Rngs(0)))
    )
    np.testing.assert_allclose(logits(model, TOKENS), logits(unrolled, TOKENS), atol=2e-5)
    for a, b in zip(*(jax.tree.leaves(gradients(m, TOKENS)) for m in (model, unrolled)),
                    strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("remat", "scan"),
    [("full", True), ("full", False), ("dots", True), ("narrow", True), ("narrow", False)]
    + [("dots_offload", True), ("full_offload", True), ("full_offload", False)],
)
def test_recomputing_activations_changes_no_gradient(remat, scan):
    model = make()
    want = jax.tree.leaves(gradients(model, TOKENS))
    got = jax.tree.leaves(gradients(with_config(model, remat=remat, scan=scan), TOKENS))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_full_recomputing_saves_less():
    def residuals(remat):
        model = with_config(make(), remat=remat)
        _, back = jax.eval_shape(lambda m: jax.vjp(lambda m: logits(m, TOKENS), m), model)
        return sum(a.size for a in jax.tree.leaves(back))

    kept = [residuals(remat) for remat in ("full", "narrow", "dots", "none")]
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(("name", "scan"), [(n, False) for n in CONFIGS] + [("llama", True)])
def test_cached_logits_are_the_full_forwards(name, scan):
    model = with_config(make(name), scan=scan)
    step = jax.jit(lambda m, tokens, positions, state: m(tokens, positions, state=state))
    state, at, parts = model.init_state(2, T), 0, []
    assert all(layer.mixer.keys_bskc.shape[0] == model.config.repeats for layer in state)
    for n in (3, 1, 1, 1):
        positions = jnp.arange(at, at + n)[None]
        out = step(model, TOKENS[:, at : at + n], positions, state)
        parts.append(out.logits_btv)
        state, at = out.state, at + n
    np.testing.assert_allclose(jnp.concatenate(parts, 1), logits(model, TOKENS), atol=1e-5)


def test_packed_segments_are_the_documents_alone():
    model = make()
    packed = jnp.concatenate((TOKENS[:1, :4], TOKENS[1:, :2]), axis=1)
    positions = jnp.array([[0, 1, 2, 3, 0, 1]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2]])
    out = model(packed, positions, segments)
    assert out.state is None and out.taps == {}
    np.testing.assert_allclose(out.logits_btv[0, :4], logits(model, TOKENS[:1, :4])[0], atol=1e-5)
    np.testing.assert_allclose(out.logits_btv[0, 4:], logits(model, TOKENS[1:, :2])[0], atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_hooks_capture_in_layer_order_and_edit_one_layer(scan):
    model = with_config(make(), scan=scan)
    names = ("embedding", "residual", "attention.weights", "mlp.output", "final")
    plain = model(TOKENS, hooks=Hooks(capture=names))
    np.testing.assert_allclose(plain.logits_btv, logits(model, TOKENS), atol=1e-5)
    taps = plain.taps
    assert set(taps) == set(names)
    assert taps["residual"].shape == (4, 2, T, D)
    np.testing.assert_array_equal(taps["residual"][0], taps["embedding"])
    np.testing.assert_allclose(
        taps["final"] @ model.embedding.table[...].T, plain.logits_btv, atol=1e-5
    )
    weights = taps["attention.weights"]
    assert weights.shape == (4, 2, 4, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not np.any(weights[0::2, ..., 3:, 0]) and np.all(weights[1::2, ..., 3:, 0])  # window 3

    def silence(x, layer):
        return jnp.where(layer == 2, 0, x)

    cut = model(TOKENS, hooks=Hooks(capture=names, edit={"mlp.output": silence})).taps
    np.testing.assert_allclose(cut["residual"][:3], taps["residual"][:3], atol=1e-6)
    np.testing.assert_allclose(
        cut["residual"][3], taps["residual"][3] - taps["mlp.output"][2], atol=1e-5
    )
    assert not np.any(cut["mlp.output"][2])


def test_scanned_and_unrolled_hooks_agree():
    hooks = Hooks(
        capture=("residual",), edit={"attention.weights": lambda x, layer: x * (1 + layer)}
    )
    a, b = (with_config(make(), scan=s)(TOKENS, hooks=hooks) for s in (True, False))
    np.testing.assert_allclose(a.logits_btv, b.logits_btv, atol=1e-5)
    np.testing.assert_allclose(a.taps["residual"], b.taps["residual"], atol=1e-5)


def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients():
    model = with_config(make(), dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    got = logits(model, TOKENS)
    assert got.dtype == jnp.float32
    want = logits(make(), TOKENS)
    assert 0 < float(jnp.abs(got - want).max()) < 0.05 * float(jnp.abs(want).max())
    assert {a.dtype for a in jax.tree.leaves(gradients(model, TOKENS))} == {jnp.dtype("float32")}
    assert model.init_state(1, 4)[0].mixer.keys_bskc.dtype == jnp.bfloat16
    stored = Decoder(dataclasses.replace(BASE, param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    assert {a.dtype for a in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_a_70b_model_takes_no_memory_to_plan():
    config = DecoderConfig(
        128_256, 8192, 80, AttentionConfig(64, 8), MlpConfig(28_672), tie_embeddings=False
    )
    shapes = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(shapes)
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in leaves)
    assert sum(a.size for a in leaves) == 70_553_706_496  # Llama 3 70B
    cache = jax.eval_shape(lambda m: m.init_state(1, 8192), shapes)
    assert cache[0].mixer.keys_bskc.shape == (80, 1, 8192, 8, 128)


def test_gradients_reach_every_parameter():
    for name in CONFIGS:
        for path, a in jax.tree.leaves_with_path(gradients(make(name), TOKENS)):
            assert np.any(a), (name, jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(TOKENS[0]), "tokens='int32[6]': must be integers of shape [batch, time]"),
        (lambda m: m(TOKENS * 1.0),
         "tokens='float32[2, 6]': must be integers of shape [batch, time]"),
        (lambda m: m(TOKENS, state=m.init_state(2, T)),
         "positions=None: with a state, say where the tokens stand"),
        (lambda m: m(jnp.zeros((1, T + 1), jnp.int32)), "tokens=7: longer than max_length=6"),
        (lambda m: m(TOKENS, jnp.arange(T)[None], state=m.init_state(2, T - 1)),
         "tokens=6: the cache holds at most max_length=5"),
        (lambda m: m.init_state(0, T), "batch=0: must be > 0"),
    ],
)  # fmt: skip
def test_refuses_before_compiling(call, message):
    with pytest.raises(ConfigError) as raised:
        call(make("gpt-2"))
    assert str(raised.value) == message


def test_a_position_past_the_learned_table_is_nan():
    model = make("gpt-2")
    out = model(TOKENS[:, :2], jnp.array([[0, T]])).logits_btv
    assert np.all(np.isnan(out[:, 1]))
