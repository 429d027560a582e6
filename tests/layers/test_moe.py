"""Mixtures of experts against transformers, NumPy in float64, and one another."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.context import Context
from layers.decoder import Decoder, DecoderConfig
from layers.hooks import Hooks, Tap
from layers.mlp import MlpConfig
from layers.moe import Moe, load_entropy
from layers.routing import (
    MoeConfig,
    assign,
    balance_loss,
    choose_experts,
    choose_tokens,
    within_capacity,
    z_loss,
)
from layers.stack import rearranged

B, T, D, F, E = 2, 7, 8, 6, 4
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def make(**options):
    config = MoeConfig(**{"num_experts": E, "width": F, **options})
    return jax.jit(lambda: Moe(config, D, rngs=nnx.Rngs(0)))()


@jax.jit
def run(moe, x, positions):
    y, after = moe(x, Context.of_tokens(positions))
    return y, after.report


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def reference(moe, x, weights_bte):
    """Every expert on every token, in float64."""
    x = x.astype(np.float64)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (moe.gate, moe.up, moe.down))
    g = np.einsum("btd,edf->btef", x, gate)
    h = g / (1 + np.exp(-g)) * np.einsum("btd,edf->btef", x, up)
    return np.einsum("bte,btef,efd->btd", weights_bte, h, down)


def scattered(weights, experts):
    out = np.zeros((*weights.shape[:2], E))
    np.put_along_axis(out, experts, weights, -1)
    return out


GROUPS = [dict(capacity_group="segment"), dict(capacity_group="row")]
ROUTED = {
    "softmax": dict(router="softmax", normalize=False),
    "switch": dict(router="softmax", top_k=1, normalize=False),
    "normalized": dict(router="softmax"),
    "choice_softmax": dict(router="choice_softmax", scale=1.5),
    "noisy": dict(router="noisy"),
    "sigmoid": dict(router="sigmoid", scale=2.5),
}


@pytest.mark.parametrize("name", ROUTED)
def test_each_router_against_numpy(name):
    moe = make(**ROUTED[name])
    config = moe.config
    logits = X.astype(np.float64) @ np.asarray(moe.router.weight[...], np.float64)
    experts = np.argsort(-logits, -1)[..., : config.top_k]
    chosen = np.take_along_axis(logits, experts, -1)
    if name in ("choice_softmax", "noisy"):
        weights = softmax(chosen)
    else:
        all_scores = 1 / (1 + np.exp(-logits)) if name == "sigmoid" else softmax(logits)
        weights = np.take_along_axis(all_scores, experts, -1)
        if config.normalize:
            weights /= weights.sum(-1, keepdims=True)
    want = reference(moe, X, scattered(weights * config.scale, experts))
    y, stats = run(moe, X, POSITIONS)
    np.testing.assert_allclose(y, want, atol=2e-6)
    np.testing.assert_array_equal(stats.counts_e, np.bincount(experts.ravel(), minlength=E))


def test_expert_choice_against_numpy():
    moe = make(router="expert_choice", capacity_factor=1.0, capacity_group="row")
    capacity = int(np.ceil(T * 2 / E))
    p = softmax(X.astype(np.float64) @ np.asarray(moe.router.weight[...], np.float64))
    weights = np.zeros_like(p)
    for b in range(B):
        for e in range(E):
            best = np.argsort(-p[b, :, e])[:capacity]
            weights[b, best, e] = p[b, best, e]
    y, stats = run(moe, X, POSITIONS)
    np.testing.assert_allclose(y, reference(moe, X, weights), atol=2e-6)
    np.testing.assert_array_equal(stats.counts_e, [B * capacity] * E)
    assert stats.dropped == np.sum(weights.sum(-1) == 0)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_dropless_is_a_capacity_that_drops_nothing_values_and_gradients(router):
    options = dict(router=router, balance_weight=0.1, z_weight=0.01, shared_experts=1)
    positions = POSITIONS.copy()
    positions[1, 4:] = -1

    def value(moe, x):
        y, after = moe(x, Context.of_tokens(positions))
        stats = after.report
        return jnp.sum(jnp.sin(y)) + stats.loss, stats

    found = []
    for capacity in (dict(), *({**group, "capacity_factor": float(E)} for group in GROUPS)):
        moe = make(**capacity, **options)
        (out, stats), grads = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(moe, X)
        assert stats.dropped == 0 and stats.counts_e.sum() == 2 * (T + 4)
        found.append(jax.tree.leaves((out, grads)))
    for a, *others in zip(*found, strict=True):
        for b in others:
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_is_neither_routed_nor_counted():
    for capacity in (dict(), *({**group, "capacity_factor": 1.0} for group in GROUPS)):
        moe = make(**capacity, balance_weight=1.0, z_weight=1.0)
        positions = POSITIONS.copy()
        positions[:, 5:] = -1
        y, stats = run(moe, X, positions)
        other, same = run(moe, np.where(positions[..., None] < 0, 9.0, X), positions)
        np.testing.assert_array_equal(y, other)
        assert not np.any(y[:, 5:]) and stats.counts_e.sum() == 2 * B * 5
        np.testing.assert_allclose(stats.loss, same.loss, rtol=1e-6)


@pytest.mark.parametrize(
    "router, group",
    [
        *itertools.product(("softmax", "sigmoid"), ("row", "segment", None)),
        ("expert_choice", "row"),
    ],
)
def test_padding_takes_no_capacity(router, group):
    """Left, right and between: the tokens go where they go alone."""
    moe = make(router=router, **(dict(capacity_factor=0.5, capacity_group=group) if group else {}))
    alone, stats = run(moe, X[:, :3], POSITIONS[:, :3])
    for places in ((4, 5, 6), (0, 1, 2), (1, 3, 5)):
        positions, x = np.full((B, T), -1), np.full((B, T, D), 3.0, np.float32)
        positions[:, places], x[:, places] = np.arange(3), X[:, :3]
        y, padded = run(moe, x, positions.astype(np.int32))
        np.testing.assert_allclose(y[:, places], alone, atol=1e-6)
        np.testing.assert_array_equal(padded.counts_e, stats.counts_e)
        assert padded.dropped == stats.dropped and padded.asked == stats.asked


@pytest.mark.parametrize("capacity", [dict(), dict(capacity_factor=1.0, capacity_group="row")])
def test_taps_see_and_change_the_chosen_experts_hidden_units(capacity):
    moe = make(router="choice_softmax", **capacity)
    names = ("router.logits", "experts.hidden")
    tap = Tap(Hooks(capture=names), 0)
    y, _ = moe(X, Context.of_tokens(POSITIONS, tap=tap))
    logits = X @ np.asarray(moe.router.weight[...])
    np.testing.assert_allclose(tap.captured["router.logits"], logits, atol=1e-5)
    h, down = np.asarray(tap.captured["experts.hidden"]), np.asarray(moe.down[...])
    if not capacity:
        experts = np.argsort(-logits, -1)[..., :2]
        weights = softmax(np.take_along_axis(logits, experts, -1))
        want = np.einsum("btk,btkf,btkfd->btd", weights, h, down[experts])
        np.testing.assert_allclose(y, want, atol=1e-5)
    silent = Tap(Hooks(edit={"experts.hidden": lambda x, layer: x * 0}), 0)
    assert not np.any(moe(X, Context.of_tokens(POSITIONS, tap=silent))[0])


def kept_in_time(config, experts, valid, segments):
    """Token by token: an expert takes it unless it has as many of its group as it may take."""
    by_segment = config.capacity_group == "segment"
    kept = np.zeros(experts.shape, bool)
    for b, t, k in np.ndindex(experts.shape):
        if valid[b, t]:
            mine = valid[b] & (segments[b] == segments[b, t]) if by_segment else valid[b]
            even = config.capacity_factor * mine.sum() * config.top_k / config.num_experts
            earlier = (experts[b, :t] == experts[b, t, k]) & kept[b, :t]
            kept[b, t, k] = earlier[mine[:t]].sum() < max(1, np.ceil(even))
    return kept


@pytest.mark.parametrize("group", GROUPS)
def test_drops_are_counted_exactly(group):
    moe = make(capacity_factor=0.5, **group)
    logits = X.astype(np.float64) @ np.asarray(moe.router.weight[...], np.float64)
    experts = np.argsort(-logits, -1)[..., :2]
    kept = kept_in_time(moe.config, experts, POSITIONS >= 0, np.zeros((B, T)))
    weights = softmax(np.take_along_axis(logits, experts, -1)) * kept
    y, stats = run(moe, X, POSITIONS)
    assert stats.dropped == np.sum(~kept) > 0 and stats.asked == kept.size
    np.testing.assert_allclose(y, reference(moe, X, scattered(weights, experts)), atol=2e-6)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts_take_tokens_in_order_of_time(k, group):
    rng, rows, t = np.random.default_rng(k), 20, 12
    experts = np.argsort(rng.normal(size=(rows, t, E)) + [1.5, 0.5, 0, 0], -1)[..., ::-1][..., :k]
    segments = np.sort(rng.integers(0, 4, (rows, t)), axis=-1)
    valid, weights = rng.random((rows, t)) < 0.8, rng.random((rows, t, k)).astype(np.float32)
    config = MoeConfig(E, F, top_k=k, capacity_factor=0.8, **group)
    want = kept_in_time(config, experts, valid, segments)
    assert 0.1 < np.mean(want[valid]) < 0.95
    if config.capacity_group == "segment":
        got = within_capacity(config, *map(jnp.asarray, (experts, valid, segments)))
        one = within_capacity(config, jnp.asarray(experts), jnp.asarray(valid), None)
        want_one = kept_in_time(config, experts, valid, np.zeros_like(segments))
        np.testing.assert_array_equal(one, want_one)
    else:
        dispatch, combine = assign(config, *map(jnp.asarray, (weights, experts, valid)))
        taken = np.any(dispatch, axis=-1)
        got = np.take_along_axis(taken, experts, -1)
        assert np.sum(taken) == np.sum(got)
        np.testing.assert_array_equal(jnp.sum(combine, -1), scattered(weights * want, experts))
    np.testing.assert_array_equal(got, want)


def test_losses_against_float64_numpy_and_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers"
    )
    logits = np.random.default_rng(1).normal(size=(1, 9, E))
    p = softmax(logits)
    for k in (1, 2):
        experts = np.argsort(-logits, -1)[..., :k]
        counts = np.bincount(experts.ravel(), minlength=E)
        valid = jnp.ones((1, 9), bool)
        got = balance_loss(jnp.array(p, jnp.float32), jnp.array(counts), valid, k)
        want = E * np.sum(counts / (9 * k) * p.mean((0, 1)))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        them = theirs.load_balancing_loss_func(torch.tensor(p), torch.tensor(experts))
        np.testing.assert_allclose(got, them / k, rtol=1e-6)
    want = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    np.testing.assert_allclose(z_loss(jnp.array(logits), valid), want, rtol=1e-6)
    them = theirs.router_z_loss_func(torch.tensor(logits))
    np.testing.assert_allclose(them, want, rtol=1e-6)
    assert load_entropy(jnp.full((2, E), 3.0)) == pytest.approx(1)
    assert load_entropy(jnp.array([[5.0, 0, 0, 0]])) == pytest.approx(0)


def torch_block(kind):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        config = transformers.MixtralConfig(
            hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
        )
        options = dict(router="choice_softmax")
    else:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE as Block

        config = transformers.DeepseekV3Config(
            hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=2,
            n_shared_experts=2, n_group=2, topk_group=1, routed_scaling_factor=2.5,
        )  # fmt: skip
        options = dict(
            router="sigmoid", groups=2, top_groups=1, scale=2.5, shared_experts=2, bias_rate=0.1
        )
    config._experts_implementation = "eager"
    block = Block(config)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return block, make(**options)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek"])
def test_values_and_gradients_of_transformers(kind):
    torch = pytest.importorskip("torch")
    block, moe = torch_block(kind)

    def array(p):
        return jnp.array(p.detach().numpy())

    moe.router.weight[...] = array(block.gate.weight).T
    gate, up = jnp.split(jnp.swapaxes(array(block.experts.gate_up_proj), 1, 2), 2, axis=-1)
    moe.gate[...], moe.up[...] = gate, up
    moe.down[...] = jnp.swapaxes(array(block.experts.down_proj), 1, 2)
    if kind == "deepseek":
        bias = np.array([0.3, -0.2, 0.1, 0.0], np.float32)
        block.gate.e_score_correction_bias.copy_(torch.tensor(bias))
        moe.bias[...] = jnp.array(bias)
        for name in ("gate", "up", "down"):
            theirs = getattr(block.shared_experts, f"{name}_proj").weight
            getattr(moe.shared, name).weight[...] = array(theirs).T
    x = torch.tensor(X, requires_grad=True)
    want = block(x)
    torch.sin(want).sum().backward()

    def loss(moe, x):
        y, _ = moe(x, Context.of_tokens(POSITIONS))
        return jnp.sum(jnp.sin(y)), y

    (_, y), (g, gx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(moe, X)
    np.testing.assert_allclose(y, want.detach(), atol=1e-5)
    np.testing.assert_allclose(gx, x.grad, atol=2e-5)
    np.testing.assert_allclose(g.router.weight[...], block.gate.weight.grad.T, atol=2e-5)
    np.testing.assert_allclose(g.down[...], block.experts.down_proj.grad.transpose(1, 2), atol=2e-5)
    if kind == "deepseek":
        assert not np.any(g.bias[...])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, E), st.integers(1, 5), st.integers(0, 99))
def test_places_are_given_once(t, k, capacity, seed):
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(seed), (2, t, E)))
    valid = jax.random.bernoulli(jax.random.key(seed + 1), 0.7, (2, t))
    config = MoeConfig(E, F, top_k=k, capacity_factor=capacity * E / (t * k))
    weights, experts = choose_experts(config, scores, None)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert all(len(set(row)) == k for row in np.asarray(experts).reshape(-1, k))
    for dispatch, combine in (
        assign(config, weights, experts, valid),
        choose_tokens(config, scores, valid),
    ):
        assert dispatch.shape == (2, t, E, min(t, capacity))
        most = config.capacity(np.asarray(valid).sum(1))
        assert np.all(np.asarray(dispatch).sum((1, 3)) <= most[:, None])
        assert np.asarray(dispatch).sum(1).max() <= 1
        assert not np.any(np.asarray(dispatch)[~np.asarray(valid)])
        assert not np.any(np.asarray(combine)[~np.asarray(dispatch)])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_experts=0), "num_experts=0: must be > 0"),
        (dict(top_k=5), "top_k=5: must be in 1 … num_experts=4"),
        (dict(router="sigmod"), "router='sigmod': must be one of .* mean 'sigmoid'"),
        (dict(groups=2), "groups=2: requires router='sigmoid'"),
        (dict(groups=3, router="sigmoid"), "groups=3: must divide num_experts=4"),
        (
            dict(groups=2, top_k=3, router="sigmoid"),
            "top_k=3: must be at most 2, those in top_groups",
        ),
        (dict(bias_rate=0.1), "bias_rate=0.1: requires router='sigmoid'"),
        (dict(jitter=1.0), "jitter=1.0: must be in"),
        (dict(capacity_factor=0.0), "capacity_factor=0.0: must be > 0 or None"),
        (
            dict(router="expert_choice", capacity_factor=1.0),
            "capacity_group='segment': must be 'row', required by router='expert_choice'",
        ),
        (dict(router="expert_choice"), "capacity_factor=None: is required by router="),
        (dict(capacity_group="row"), "capacity_group='row': requires capacity_factor"),
        (dict(capacity_group="rows"), "capacity_group='rows': must be one of .* mean 'row'"),
        (dict(z_weight=-1.0), "z_weight=-1.0: must be ≥ 0"),
    ],
)
def test_a_bad_configuration_names_its_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        MoeConfig(**{"num_experts": E, "width": F, **changes})


DECODER = DecoderConfig(
    11, D, 4, AttentionConfig(2), MlpConfig(F), moe=MoeConfig(E, F, balance_weight=0.1),
    pattern=("attention",) * 2, feed_forward=("mlp", "moe"),
)  # fmt: skip


def test_a_stack_reports_its_mixtures_scanned_or_not_and_generates():
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 11)
    outputs = []
    for options in (dict(), dict(scan=False), dict(remat="full")):
        config = dataclasses.replace(DECODER, **options)
        model = jax.jit(lambda c=config: Decoder(c, rngs=nnx.Rngs(0)))()

        def loss(model):
            out = model(tokens)
            return jnp.sum(jnp.sin(out.logits_btv)) + jnp.sum(out.aux.loss), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
        grads = rearranged(grads, scan=True)
        assert out.aux.counts_e.shape == (2, E) and np.all(out.aux.counts_e.sum(-1) == 2 * B * T)
        outputs.append(jax.tree.leaves((out, grads)))
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(4, np.abs(b).max()))
    state, parts = model.init_state(B, T), []
    for at in (slice(0, 3), slice(3, T)):
        part = jax.jit(Decoder.__call__)(model, tokens[:, at], POSITIONS[:, at], None, state)
        state, parts = part.state, [*parts, part.logits_btv]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), out.logits_btv, atol=2e-5)


def test_noise_needs_a_key_and_expert_choice_cannot_generate():
    for options in (dict(router="noisy"), dict(jitter=0.3)):
        moe = make(**options)
        keys = (None, jax.random.key(0), jax.random.key(0))
        a, b, c = (moe(X, Context.of_tokens(POSITIONS, key=key))[0] for key in keys)
        np.testing.assert_array_equal(b, c)
        assert np.any(a != b)
    choice = MoeConfig(E, F, router="expert_choice", capacity_factor=1.0, capacity_group="row")
    model = Decoder(dataclasses.replace(DECODER, moe=choice), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="moe.router='expert_choice': does not support gen"):
        model.init_state(1, 4)
