"""What every sequence mixer must be: parallel, token by token and in any chunks the same function.

Whole decoders, so that feed-forward layers that look back are held to it too. All parameters are
moved from where they begin, for some begin at 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.architecture import CACHED, MIXERS
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.hooks import Hooks
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.paged_cache import PagedCache
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from layers.stack import unstacked
from layers.state import (
    CONTIGUOUS,
    CacheConfig,
    LayerState,
    can_rewind,
    cleared,
    copy_row,
    put_row,
    rewind,
    rollback,
    take_row,
    with_table,
)
from layers.weights import flat
from pallas_kernels.stored import DTYPES, Stored

T = 5
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2)
WINDOW = AttentionConfig(num_heads=4, num_kv_heads=2, window=3)
RWKV = RwkvConfig(head_dim=8, decay_rank=3, rate_rank=3, value_rank=3, gate_rank=3)
MAMBA = MambaConfig(state=3, convolution=3)
LAYER_NORM = dict(norm="layernorm", norm_bias=True, embedding_norm=True)
STACKS = {
    "attention": dict(
        pattern=("attention",),
        attention=dataclasses.replace(ATTENTION, clip=1.5, scale_by_layer=True),
    ),
    "sliding": dict(pattern=("sliding",), attention=WINDOW),
    "latent": dict(
        pattern=("latent",),
        latent=LatentConfig(4, rank=6, head_dim=4, rotary_dim=2, value_dim=3, query_rank=5),
        position="rotary",
    ),
    "mamba": dict(pattern=("mamba",), feed_forward=("none",), mamba=MAMBA),
    "mamba_fixed": dict(
        pattern=("mamba",),
        feed_forward=("none",),
        mamba=dataclasses.replace(MAMBA, selective=("b",)),
    ),
    "mamba2": dict(
        pattern=("mamba2",),
        feed_forward=("none",),
        # the least step is not 0: padding must not take it
        mamba=MambaConfig(
            state=3, convolution=3, head_dim=8, groups=2, delta_least=0.004, delta_most=0.4
        ),
    ),
    "rwkv4": dict(
        pattern=("rwkv4",),
        feed_forward=("rwkv4",),
        rwkv=RwkvConfig(channels=12, rescale_every=1),
        **LAYER_NORM,
    ),
    "rwkv7": dict(pattern=("rwkv7",), feed_forward=("rwkv7",), rwkv=RWKV, **LAYER_NORM),
    "hybrid": dict(
        pattern=("attention", "rwkv7"), feed_forward=("mlp", "none"), attention=ATTENTION, rwkv=RWKV
    ),
}
# further feed-forward layers that look back, or whose tokens compete
MIXTURES = {
    name: dict(pattern=("attention",), attention=ATTENTION, feed_forward=("moe",), moe=moe)
    for name, moe in {
        "dropless": MoeConfig(4, 8),
        "segment, top 1": MoeConfig(4, 8, top_k=1, normalize=False, capacity_factor=1.0),
        "segment, top 2": MoeConfig(4, 8, capacity_factor=0.7),
        "row, top 1": MoeConfig(4, 8, top_k=1, capacity_factor=1.0, capacity_group="row"),
        "row, top 2": MoeConfig(4, 8, capacity_factor=0.7, capacity_group="row"),
    }.items()
}
PAGED = CacheConfig("paged", page=2)
STORING = [name for name, stack in STACKS.items() if not set(stack["pattern"]).isdisjoint(CACHED)]
with_caches = pytest.mark.parametrize(
    ("name", "cache"),
    [
        *(pytest.param(name, CONTIGUOUS, id=name) for name in STACKS),
        *(pytest.param(name, PAGED, id=f"{name}-paged") for name in STORING),
    ],
)
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, 11)


@functools.cache
def make(name):
    options = {"position": "none", **(STACKS | MIXTURES)[name]}
    config = DecoderConfig(11, 16, 2 * len(options["pattern"]), mlp=MlpConfig(24), **options)

    @jax.jit
    def moved():
        model = Decoder(config, rngs=nnx.Rngs(0))
        keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(model))))
        return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), model)

    return moved()


@pytest.mark.parametrize(
    "stack, kept",
    [
        (STACKS["mamba"], {"mixer/log_rate", "mixer/skip"}),
        (STACKS["mamba2"], {"mixer/log_rate", "mixer/skip"}),
        (STACKS["rwkv4"], {"mixer/decay", "mixer/bonus"}),
        (
            dict(STACKS["attention"], feed_forward=("moe",), moe=MoeConfig(4, 8, router="sigmoid")),
            {"mlp/router/weight", "mlp/bias"},
        ),
        (
            dict(STACKS["attention"], feed_forward=("moe",), moe=MoeConfig(4, 8, router="noisy")),
            {"mlp/router/weight", "mlp/noise/weight"},
        ),
    ],
    ids=("mamba", "mamba2", "rwkv4", "sigmoid", "noisy"),
)
def test_exponents_and_routers_are_stored_in_float32(stack, kept):
    config = DecoderConfig(11, 16, 1, mlp=MlpConfig(24), param_dtype="bfloat16", **stack)
    leaves = flat(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    assert {name for name, leaf in leaves.items() if leaf.dtype == jnp.float32} == {
        f"blocks/0/{name}" for name in kept
    }


def test_every_mixer_is_here():
    assert {kind for stack in STACKS.values() for kind in stack["pattern"]} == set(MIXERS)


@jax.jit
def read(model, tokens, positions, segments, state=None):
    return model(tokens, positions, segments, state=state)


def empty(model, batch, cache=CONTIGUOUS, length=T):
    """An empty state. Pages are in another order than rows, and hold what others left there."""
    state = model.init_state(batch, length, cache)
    if cache.kind == "contiguous":
        return state

    def left(layer):
        if not isinstance(layer, PagedCache):
            return layer
        pools = layer.keys, layer.values
        garbage = jax.tree.map(
            lambda a: jnp.full_like(a, jnp.nan if a.dtype.kind == "f" else 7), pools
        )
        return dataclasses.replace(
            layer, keys=garbage[0], values=garbage[1], positions_ps=0 * layer.positions_ps
        )

    state = jax.tree.map(left, state, is_leaf=lambda node: isinstance(node, LayerState))
    pages = batch * -(-length // cache.page)
    return with_table(state, jnp.arange(pages)[::-1].reshape(batch, -1))


def in_chunks(model, tokens, positions, segments, sizes, cache=CONTIGUOUS):
    state, at, parts = empty(model, tokens.shape[0], cache), 0, []
    for n in sizes:
        here = slice(at, at + n)
        out = read(model, tokens[:, here], positions[:, here], segments[:, here], state)
        parts.append(out.logits_btv)
        state, at = out.state, at + n
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnames=("sizes", "cache"))
def gradients(model, *tokens, sizes, cache=CONTIGUOUS):
    weights = jax.random.normal(jax.random.key(3), (2, T, 11))

    def loss(model):
        if not sizes:
            return jnp.sum(read(model, *tokens).logits_btv * weights)
        return jnp.sum(in_chunks(model, *tokens, sizes, cache) * weights)

    return jax.tree.leaves(jax.grad(loss)(model))


@with_caches
def test_parallel_is_recurrent_is_chunked(name, cache):
    model = make(name)
    for segments, positions in (
        ([[0] * T] * 2, [list(range(T))] * 2),
        ([[1, 1, 2, 3, 3], [4, 4, 4, 4, 5]], [[0, 1, 0, 0, 1], [0, 1, 2, 3, 0]]),
    ):
        tokens = TOKENS, jnp.array(positions), jnp.array(segments)
        want = read(model, *tokens).logits_btv
        for sizes in ((1,) * T, (3, 2)):
            np.testing.assert_allclose(in_chunks(model, *tokens, sizes, cache), want, atol=3e-5)
        got, want = (gradients(model, *tokens, sizes=s, cache=cache) for s in ((3, 2), None))
        assert all(np.any(a) for a in want)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=6e-5 * max(1, float(np.abs(b).max())))


@jax.jit
def of_weighted(model, tokens, positions, segments, weights):
    """Logits, and the gradients of a function of those of the weighted tokens."""

    def loss(model):
        logits = model(tokens, positions, segments).logits_btv
        return jnp.sum(weights[..., None] * jnp.sin(logits)), logits

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(model)
    return logits, jax.tree.leaves(grads)


@pytest.mark.parametrize("name", [*STACKS, *MIXTURES])
def test_only_the_past_of_its_document_changes_a_token(name):
    """Not padding, other documents of the row, later tokens or other rows: values, gradients."""
    model, is_row = make(name), name.startswith("row")
    mine, other, n = [3, 7, 7], [7, 7, 2], 3
    alone = jax.jit(lambda m, tokens: m(tokens).logits_btv)(model, jnp.array([mine]))[0]

    def run(tokens, positions, segments, at, beside):
        neighbour = jax.random.randint(jax.random.key(beside), (2 * n,), 0, 11)
        weights = np.zeros((2, 2 * n), np.float32)
        weights[0, at : at + n] = 1
        rows = (
            [tokens, neighbour],
            [positions, np.full(2 * n, -1) if beside == 1 else np.arange(2 * n)],
            [segments, np.arange(2 * n) // beside],
        )
        rows = (jnp.stack([jnp.array(row, jnp.int32) for row in pair]) for pair in rows)
        logits, grads = of_weighted(model, *rows, weights)
        return logits[0, at : at + n], grads

    def is_equal(got, want):
        np.testing.assert_allclose(got[0], want[0], atol=3e-5)
        for a, b in zip(got[1], want[1], strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * max(1, float(np.abs(b).max())))

    count, gap = [0, 1, 2], [-1] * n
    want = run(mine + [9] * n, count + gap, [0] * 6, 0, 1)
    np.testing.assert_allclose(want[0], alone, atol=3e-5)
    # of three tokens some parameters change nothing: all steps of a scan may be at their limit
    assert sum(map(np.any, want[1])) > 0.8 * len(want[1])
    is_equal(run([8] * n + mine, gap + count, [0] * 6, n, 2), want)
    is_equal(run([8, *mine, 8, 8], [-1, *count, -1, -1], [0] * 6, 1, 3), want)
    if not is_row:  # whose documents share a capacity
        is_equal(run(mine + other, count * 2, [4] * n + [5] * n, 0, 4), want)
        is_equal(run(other + mine, count * 2, [5] * n + [4] * n, n, 5), want)
    # a longer segment may have a larger capacity, which must not depend on the later tokens
    longer = [run(mine + later, range(6), [0] * 6, 0, 2) for later in (other, [0, 1, 10])]
    is_equal(*longer)
    if "moe" not in model.config.feed_forward or model.config.moe.capacity_factor is None:
        is_equal(longer[0], want)


@with_caches
def test_padding_changes_no_state(name, cache):
    """Rows of 3, 0 and 2 tokens in one call, then of 2, 5 and 0 more."""
    model = make(name)
    tokens = jax.random.randint(jax.random.key(4), (3, 2 * T), 0, 11)
    counts = [(3, 2), (0, 5), (2, 0)]
    state, got = empty(model, 3, cache), [[], [], []]
    for call in range(2):
        at = [sum(c[:call]) for c in counts]
        positions = [
            [a + i if i < c[call] else -1 for i in range(T)]
            for a, c in zip(at, counts, strict=True)
        ]
        these = jnp.stack([jnp.roll(row, -a)[:T] for row, a in zip(tokens, at, strict=True)])
        out = read(model, these, jnp.array(positions), jnp.zeros((3, T), jnp.int32), state)
        state = out.state
        for row, c in enumerate(counts):
            got[row].append(out.logits_btv[row, : c[call]])
    whole = jax.jit(lambda m, tokens: m(tokens).logits_btv)(model, tokens[:, :T])
    for row, c in enumerate(counts):
        want = whole[row, : sum(c)]
        np.testing.assert_allclose(jnp.concatenate(got[row]), want, atol=3e-5)


LEFT = [[-1, -1, 0, 1, 2], [0, 1, 2, -1, -1], [-1, 0, 1, 2, -1], [-1] * 5]


@with_caches
def test_padding_on_either_side_is_no_token(name, cache):
    """The same three tokens behind padding, before it and between it: without and with a state."""
    model = make(name)
    three = TOKENS[:1, :3]
    # three tokens and the two that follow; and these two alone (what is after them is not seen)
    after = TOKENS[1:, jnp.array([0, 2])]
    rows = jnp.concatenate((jnp.concatenate((three, after), 1), jnp.concatenate((after, three), 1)))
    want = read(model, rows, jnp.tile(jnp.arange(5), (2, 1)), jnp.zeros((2, 5), jnp.int32))
    first, alone = want.logits_btv
    positions = jnp.array(LEFT)
    tokens = jnp.where(positions >= 0, three[0, positions], 7)
    segments = jnp.zeros_like(positions)
    for state in (None, empty(model, 4, cache)):
        got = read(model, tokens, positions, segments, state)
        for row, at in enumerate(LEFT[:3]):
            real = np.array(at) >= 0
            np.testing.assert_allclose(got.logits_btv[row, real], first[:3], atol=3e-5)
    # and what follows, in a call of its own with padding in its middle
    positions = jnp.array([[3, -1, 4]] * 3 + [[0, -1, 1]])
    more = jnp.broadcast_to(TOKENS[1, :3], (4, 3))
    out = read(model, more, positions, jnp.zeros_like(positions), got.state).logits_btv
    for row in range(3):
        np.testing.assert_allclose(out[row, jnp.array([0, 2])], first[3:], atol=3e-5)
    np.testing.assert_allclose(out[3, jnp.array([0, 2])], alone[:2], atol=3e-5)


@with_caches
def test_a_state_rewinds_or_says_that_it_cannot(name, cache):
    model = make(name)
    positions, segments = jnp.tile(jnp.arange(T), (2, 1)), jnp.zeros((2, T), jnp.int32)
    before = read(model, TOKENS[:, :3], positions[:, :3], segments[:, :3], empty(model, 2, cache))
    other = (TOKENS[:, 3:] + 1) % 11, positions[:, 3:], segments[:, 3:]
    state = read(model, *other, before.state).state
    rolls = name == "sliding" and cache.kind == "contiguous"
    if rolls or not set(STACKS[name]["pattern"]) <= set(CACHED):
        with pytest.raises(ConfigError, match="^state='?(rolling KVCache|.*State)"):
            rewind(state, jnp.array([2, 2]))
        return
    rest = TOKENS[:, 3:], positions[:, 3:], segments[:, 3:]
    want = read(model, *rest, before.state).logits_btv
    got = read(model, *rest, rewind(state, jnp.array([2, 2]))).logits_btv
    np.testing.assert_allclose(got, want, atol=1e-6)


def positions_of(start, count, rows=2):
    return jnp.tile(jnp.arange(start, start + count), (rows, 1)), jnp.zeros((rows, count), int)


@with_caches
def test_rows_are_taken_put_copied_cleared_and_rolled_back(name, cache):
    model, new = unstacked(make(name)), functools.partial(empty, cache=cache)
    is_paged = cache.kind == "paged"
    first = read(model, TOKENS[:, :3], *positions_of(0, 3), new(model, 2)).state
    rest = TOKENS[:, 3:], *positions_of(3, 2)
    want = read(model, *rest, first)

    @jax.jit
    def through_a_row(state, row):
        alone = read(model, *(jnp.take(a, row[None], 0) for a in rest), take_row(state, row))
        return alone.logits_btv[0], put_row(state, row, alone.state)

    # row by row is both rows at once, and the other row stays
    state = first
    for row in (1, 0):
        got, state = through_a_row(state, jnp.int32(row))
        np.testing.assert_allclose(got, want.logits_btv[row], atol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want.state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # a copied row continues as the other
    twice = read(model, *(jnp.tile(a[1:], (2, 1)) for a in rest), copy_row(first, 1, 0))
    np.testing.assert_allclose(twice.logits_btv[0], want.logits_btv[1], atol=1e-5)
    # a row that held NaN is as good as new
    poisoned = jax.tree.map(lambda a: a * jnp.nan if a.dtype.kind == "f" else a, first)
    cleaned = put_row(first, 0, cleared(take_row(poisoned, 0)))
    fresh, again = (
        read(model, TOKENS[:1, :2], *positions_of(0, 2, rows=1), take_row(state, 0)).logits_btv
        for state in (new(model, 2), cleaned)
    )
    np.testing.assert_array_equal(again, fresh)
    if not is_paged:
        jax.tree.map(np.testing.assert_array_equal, cleared(poisoned), model.init_state(2, T))
    # rejected tokens are taken back, or the state before them is
    drafted = read(model, (TOKENS[:, 3:] + 1) % 11, *positions_of(3, 2), first).state
    back = rollback(drafted, first, jnp.array([2, 2]))
    np.testing.assert_array_equal(read(model, *rest, back).logits_btv, want.logits_btv)
    rewinds = set(STACKS[name]["pattern"]) <= set(CACHED) and (is_paged or name != "sliding")
    assert can_rewind(first) == rewinds


BOUNDS = {"bfloat16": 0.01, "float16": 0.01, "float8_e4m3fn": 0.06, "int8": 0.02, "int4": 0.3}
QUANTISED = [(n, kind, d) for n in STORING for kind in ("contiguous", "paged") for d in BOUNDS]


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        # all dtypes and mixers are in the default tests, not all pairs
        pytest.param(*case, marks=() if i % 6 == 0 else pytest.mark.slow)
        for i, case in enumerate(QUANTISED)
    ],
)
def test_a_quantised_cache_is_attention_to_rounded_keys_and_values(name, kind, dtype):
    """Without a cache, hooks round keys and values as the cache stores them."""
    model, tokens = make(name), (TOKENS, *positions_of(0, T))
    cache = dataclasses.replace(PAGED if kind == "paged" else CONTIGUOUS, dtype=dtype)
    got = in_chunks(model, *tokens, (3, 1, 1), cache)
    want = read(model, *tokens).logits_btv
    scale = float(jnp.abs(want).max())
    error = float(jnp.abs(got - want).max())
    assert 1e-5 * scale < error < BOUNDS[dtype] * scale
    if name == "latent":  # without a cache it has no latents of all heads
        want = in_chunks(model, *tokens, (1,) * T, cache)
    else:

        def rounded(x, layer):
            return Stored.of(x, dtype).load(x.dtype)

        hooks = Hooks(edit={"attention.key": rounded, "attention.value": rounded})
        want = jax.jit(lambda m, *tokens: m(*tokens, hooks=hooks).logits_btv)(model, *tokens)
    np.testing.assert_allclose(got, want, atol=3e-5)


def test_every_stored_dtype_is_here():
    assert {*BOUNDS, "float32"} == set(DTYPES)


def test_recurrent_layers_refuse_what_they_cannot_see():
    for name in ("mamba", "mamba2", "rwkv4", "rwkv7"):
        with pytest.raises(ConfigError, match="^until='given': recurrent layers do not support"):
            make(name)(TOKENS, until_bt=jnp.zeros((2, T), jnp.int32))


@pytest.mark.parametrize("name", STACKS)
def test_forward_mode_is_reverse_mode(name):
    """The derivative along one direction, of all parameters, by either mode."""
    model = make(name)
    segments = jnp.array([[1, 1, 2, 3, 3], [4, 4, 4, 4, 5]])
    positions = jnp.array([[0, 1, 0, 0, 1], [0, 1, 2, 3, 0]])
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(model))))
    along = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), model)

    @jax.jit
    def slopes(model, along):
        def loss(model):
            logits = model(TOKENS, positions, segments).logits_btv
            return jnp.mean(jnp.sin(logits))

        forwards = jax.jvp(loss, (model,), (along,))[1]
        backwards = jax.tree.map(jnp.vdot, jax.grad(loss)(model), along)
        return forwards, sum(jax.tree.leaves(backwards))

    forwards, backwards = slopes(model, along)
    np.testing.assert_allclose(forwards, backwards, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rwkv7", "hybrid"])
def test_scanned_is_unrolled(name):
    """The first layer's values travel through the scan."""
    a, b = (m(TOKENS).logits_btv for m in (make(name), unstacked(make(name))))
    np.testing.assert_allclose(a, b, atol=1e-5)
