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
from layers.hooks import Capture, Hooks
from layers.latent_attention import LatentConfig
from layers.mlp import MlpConfig
from layers.outputs_first import for_decoding
from layers.rotary import RotaryConfig, RotaryScaling
from layers.stack import rearranged, unstacked
from layers.state import CacheConfig
from pallas_kernels.mask import Mask

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
    model = rearranged(model, scan=changes.get("scan", model.config.scan))
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
    assert len(unrolled.blocks) == model.config.num_layers
    np.testing.assert_allclose(logits(model, TOKENS), logits(unrolled, TOKENS), atol=2e-5)
    want, got = (gradients(m, TOKENS) for m in (model, unrolled))
    got = rearranged(got, scan=True)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_list_of_layers_begins_as_the_stack_does():
    scanned, unrolled = (
        Decoder(dataclasses.replace(BASE, scan=scan), rngs=nnx.Rngs(0)) for scan in (True, False)
    )
    again = rearranged(unrolled, scan=True)
    assert jax.tree.structure(again) == jax.tree.structure(scanned)
    jax.tree.map(np.testing.assert_array_equal, again, scanned)


@pytest.mark.parametrize(
    ("remat", "scan"),
    [("full", True), ("full", False), ("dots", True), ("narrow", True)]
    + [("dots_offload", True), ("full_offload", False)],
)
def test_recomputing_activations_changes_no_gradient(remat, scan):
    model = make()
    want = jax.tree.leaves(gradients(model, TOKENS))
    got = rearranged(gradients(with_config(model, remat=remat, scan=scan), TOKENS), scan=True)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
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
    stacked = (model.config.repeats,) if scan else ()
    assert all(layer.mixer.keys.codes.shape[:-4] == stacked for layer in state)
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


@pytest.mark.parametrize("scan", [True, False])
def test_captures_choose_layers_and_positions_in_a_compiled_program(scan):
    model = with_config(make(), scan=scan)
    run = jax.jit(lambda m, tokens, hooks: m(tokens, hooks=hooks).taps)
    whole = run(model, TOKENS, Hooks(capture=("residual", "attention.weights", "mlp.hidden")))
    hooks = Hooks(
        capture=(
            Capture("residual", layers=(3, 0)),
            Capture("attention.weights", layers=(2,), positions=jnp.array([1, -1])),
            Capture("mlp.hidden", positions=jnp.array([0])),
        )
    )
    some = run(model, TOKENS, hooks)
    np.testing.assert_allclose(some["residual"], whole["residual"][jnp.array([3, 0])], atol=1e-6)
    weights = whole["attention.weights"][2:3, :, :, jnp.array([1, T - 1])]
    np.testing.assert_allclose(some["attention.weights"], weights, atol=1e-6)
    np.testing.assert_allclose(some["mlp.hidden"], whole["mlp.hidden"][:, :, :1], atol=1e-6)
    if not scan:  # nothing else is kept
        kept = jax.eval_shape(lambda m, h: m(TOKENS, hooks=h).taps, model, hooks)
        assert kept["residual"].shape[0] == 2
    with pytest.raises(ConfigError, match=r"^capture.layers=4: the layers with 'residual' are"):
        model(TOKENS, hooks=Hooks(capture=(Capture("residual", layers=(4,)),)))


@pytest.mark.parametrize("name", ["llama", "gemma 2", "olmo 2", "vaswani", "parallel, both"])
def test_taps_are_what_their_names_say(name):
    """Each is what the next step reads, by the parts of one layer."""
    model = with_config(make(name), scan=False)
    places = ("residual", "mixer.input", "mixer.output", "mlp.input", "mlp.hidden", "mlp.output")
    taps = jax.jit(lambda m: m(TOKENS, hooks=Hooks(capture=(*places, "attention.output"))).taps)(
        model
    )
    for i, block in enumerate(model.blocks):
        at = {name: a[i] for name, a in taps.items()}
        np.testing.assert_allclose(
            block.mixer.out(at["attention.output"]), at["mixer.output"], atol=1e-5
        )
        np.testing.assert_allclose(block.mlp.down(at["mlp.hidden"]), at["mlp.output"], atol=1e-5)
        reads = at["residual"]
        if block.mixer_norm is not None and block.norm_position != "post":
            reads = block.mixer_norm(reads)
        np.testing.assert_allclose(reads, at["mixer.input"], atol=1e-5)


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
    assert model.init_state(1, 4)[0].mixer.keys.dtype == "bfloat16"
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
    assert cache[0].mixer.keys.codes.shape == (80, 1, 8, 8192, 128)


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
         "positions=None: is required with a state"),
        (lambda m: m(jnp.zeros((1, T + 1), jnp.int32)), "tokens=7: must be at most max_length=6"),
        (lambda m: m(TOKENS, jnp.arange(T)[None], state=m.init_state(2, T - 1)),
         "tokens=6: must be at most max_length=5 of the cache"),
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


@pytest.mark.parametrize("name", ["llama", "gpt-2", "gemma 2"])
def test_three_steps_in_a_row_are_the_model(name):
    model = make(name)
    positions, segments = jnp.array([[0, 1, 2, 3, 0, 1]]), jnp.array([[1, 1, 1, 1, 2, 2]])

    @jax.jit
    def steps(model):
        x = model.embed(TOKENS, positions)
        x, run = model.run_layers(x, Mask.of_tokens(positions, segments))
        assert (run.state, run.taps, run.aux) == (None, {}, None)
        return model.unembed(x)

    want = jax.jit(lambda m: m(TOKENS, positions, segments).logits_btv)(model)
    np.testing.assert_array_equal(steps(model), want)


def test_embeddings_enter_between_the_steps():
    """A soft prompt in place of the first embeddings changes what they would have changed."""
    model = make()

    @jax.jit
    def run(model, tokens, first):
        x = model.embed(tokens)
        x, _ = model.run_layers(jnp.concatenate((first, x[:, 1:]), axis=1))
        return model.unembed(x)

    first = model.embed(TOKENS)[:, :1]
    np.testing.assert_allclose(run(model, TOKENS, first), logits(model, TOKENS), atol=1e-6)
    other = TOKENS.at[:, 0].set(0)
    np.testing.assert_allclose(run(model, other, first), logits(model, TOKENS), atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_outputs_in_place_of_logits(outputs):
    model = make("gpt-j", outputs=outputs)
    got = logits(model, TOKENS)
    x, _ = model.run_layers(model.embed(TOKENS))
    want = model.final_norm(x) @ model.head.weight[...]
    assert got.shape == (2, T, outputs) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    for changes, message in (
        (dict(tie_embeddings=True), "tie_embeddings=True: must be False with outputs"),
        (dict(logit_cap=3.0), "logit_cap=3.0: must be None with outputs"),
        (dict(outputs=0), "outputs=0: must be > 0 or None"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            dataclasses.replace(model.config, **changes)


@pytest.mark.parametrize("name", ["llama", "gemma 2"])
def test_a_prefix_is_seen_by_all_of_it_and_its_past_by_none_later(name):
    """Sliding and full layers: a token of the prefix sees its end, within the window."""
    model = make(name)
    until = jnp.where(jnp.arange(T) < 4, 3, -1)[None]
    run = jax.jit(lambda m, tokens: m(tokens, until_bt=until, hooks=hooks))
    hooks = Hooks(capture=("attention.weights",))
    weights = run(model, TOKENS).taps["attention.weights"]  # [layers, b, h, t, s]
    here = np.arange(T)
    allowed = (here[None] <= here[:, None]) | ((here[:, None] < 4) & (here[None] < 4))
    near = np.abs(here[None] - here[:, None]) < 3
    for layer, seen in enumerate((allowed & near, allowed) * 2):
        np.testing.assert_array_equal(np.all(weights[layer] > 0, (0, 1)), seen)
    plain = jax.jit(lambda m: m(TOKENS, until_bt=until).logits_btv)(model)
    np.testing.assert_allclose(plain, run(model, TOKENS).logits_btv, atol=1e-5)
    assert np.any(np.abs(plain - logits(model, TOKENS)) > 1e-3)


def test_rotations_turn_by_positions_of_their_own():
    model = make()
    doubled = 2 * jnp.arange(T)[None]
    other = jax.jit(lambda m: m(TOKENS, rotary_positions=doubled).logits_btv)(model)
    halved = with_config(model, rotary=dataclasses.replace(
        model.config.rotary, scaling=RotaryScaling("linear", 0.5)
    ))  # fmt: skip
    np.testing.assert_allclose(other, logits(halved, TOKENS), atol=1e-5)


LATENT = LatentConfig(4, rank=64, head_dim=48, rotary_dim=16, value_dim=48)


@pytest.mark.parametrize(
    ("batch", "length", "cache", "fields"),
    [
        (1, 256, CacheConfig(), dict(attention=AttentionConfig(4, 2))),
        (4, 64, CacheConfig(), dict(attention=AttentionConfig(4, 2))),
        (1, 256, CacheConfig(), dict(pattern=("latent",), latent=LATENT)),
        (1, 256, CacheConfig("paged"), dict(attention=AttentionConfig(4, 1))),
    ],
    ids=("one row", "rows", "latent", "paged"),
)
def test_decoding_copies_neither_parameters_nor_caches(batch, length, cache, fields):
    """Of the program that decodes a token, with a list of layers and the cache donated."""
    config = DecoderConfig(256, 256, 3, mlp=MlpConfig(688), scan=False, **fields)
    model = jax.eval_shape(lambda: for_decoding(Decoder(config, rngs=nnx.Rngs(0))))
    state = jax.eval_shape(lambda m: m.init_state(batch, length, cache), model)
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def step(model, state, tokens, positions):
        out = model(tokens, positions, state=state)
        return jnp.argmax(out.logits_btv, -1), out.state

    step = jax.jit(step, donate_argnums=1, compiler_options={"xla_backend_optimization_level": 2})
    compiled = step.lower(model, state, token, token).compile()
    weights, held = (
        sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) for tree in (model, state)
    )
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.1 * weights
    assert cost["bytes accessed"] <= 1.5 * (weights + held)


@pytest.mark.parametrize(("change", "error"), [(unstacked, 1e-6), (for_decoding, 4e-6)])
def test_decoding_has_the_logits_of_the_stack(change, error):
    """Products of transposed weights may be summed in another order."""
    config = DecoderConfig(64, 128, 3, attention=AttentionConfig(4, 2), mlp=MlpConfig(344))
    tokens = jax.random.randint(jax.random.key(0), (1, T), 0, 64)
    step = jax.jit(lambda m, tokens, at, state: m(tokens, at, state=state)[:2])
    parts = []
    stacked = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    for model in (stacked, change(stacked)):
        state, of_model = model.init_state(1, T), []
        for t in range(T):
            got, state = step(model, tokens[:, t : t + 1], jnp.full((1, 1), t), state)
            of_model.append(got)
        parts.append(jnp.concatenate(of_model, axis=1))
    np.testing.assert_allclose(*parts, atol=error * float(jnp.abs(parts[0]).max()))
