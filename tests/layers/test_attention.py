"""Attention against a float64 reference of its equation, and against torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import alibi
from layers.attention import Attention, AttentionConfig, attention
from layers.config import ConfigError
from layers.context import Context
from layers.context_parallel import sharded_attention
from layers.rotary import RotaryConfig
from pallas_kernels.mask import Mask

FUNCTIONS = {"equation": attention, "layer's": sharded_attention}


def seen(q_positions, k_positions, q_segments, k_segments, causal, window, until=None):
    """``[b, t, s]`` bool, a query and a key at a time."""
    b, t, s = len(q_positions), q_positions.shape[1], k_positions.shape[1]
    mask = np.zeros((b, t, s), bool)
    for n, i, j in np.ndindex(b, t, s):
        distance = q_positions[n, i] - k_positions[n, j]
        ok = k_positions[n, j] >= 0 and q_positions[n, i] >= 0
        ok &= (
            not causal or distance >= 0 or (until is not None and k_positions[n, j] <= until[n, i])
        )
        ok &= window is None or abs(distance) < window
        ok &= q_segments is None or q_segments[n, i] == k_segments[n, j]
        mask[n, i, j] = ok
    return mask


def reference(
    q, k, v, q_positions, k_positions, q_segments=None, k_segments=None, causal=True, window=None,
    slopes=None, soft_cap=None, sinks=None, scale=None, until=None,
):  # fmt: skip
    """The equation in float64 NumPy, keys repeated for each head; ``[b, t, h, c]``."""
    b, t, h, c = q.shape
    k, v = (np.repeat(a, h // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bthc,bshc->bhts", q, k) * (1 / math.sqrt(c) if scale is None else scale)
    if slopes is not None:
        distance = np.abs(q_positions[:, :, None] - k_positions[:, None, :])
        scores = scores - slopes[None, :, None, None] * distance[:, None]
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    mask = seen(q_positions, k_positions, q_segments, k_segments, causal, window, until)
    y = np.zeros((b, t, h, c))
    for n, i, j in np.ndindex(b, h, t):
        visible = mask[n, j]
        if not visible.any():
            continue
        row = scores[n, i, j, visible]
        logits = row if sinks is None else np.append(row, sinks[i])
        weights = np.exp(row - logits.max()) / np.exp(logits - logits.max()).sum()
        y[n, j, i] = weights @ v[n, visible, i]
    return y


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 3, 3, 0]], np.int32)
RESTARTED = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, -1]], np.int32)
SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
# the first 4 and 6 tokens see one another; in the second row the last one is told less than it sees
PREFIX = np.array([[3, 3, 3, 3, -1, -1, -1], [5, 5, 5, 5, 5, 5, 0]], np.int32)
IMAGES = np.array([[1, 1, 2, 0, 2, 2, 3], [1, 1, 1, 1, 1, 1, 5]], np.int32)
# name: (t, s, query heads, key heads, keyword arguments)
CASES = {
    "multi-head": (7, 7, 4, 4, {}),
    "grouped": (7, 7, 4, 2, {}),
    "multi-query": (7, 7, 4, 1, {}),
    "bidirectional": (7, 7, 4, 2, dict(causal=False)),
    "one token": (1, 1, 4, 2, {}),
    "one query": (1, 6, 4, 2, dict(q_positions=[[5], [3]])),
    "more keys": (3, 8, 4, 2, dict(q_positions=[[5, 6, 7], [1, 2, 3]])),
    "more queries": (8, 3, 4, 2, {}),
    "window": (7, 7, 4, 2, dict(window=3)),
    "window of one": (7, 7, 4, 2, dict(window=1)),
    "window past the end": (7, 7, 4, 2, dict(window=50)),
    "window both ways": (7, 7, 4, 2, dict(window=3, causal=False)),
    "packed": (7, 7, 4, 2, dict(segments=SEGMENTS, positions=RESTARTED)),
    "packed window": (7, 7, 4, 1, dict(segments=SEGMENTS, positions=RESTARTED, window=2)),
    "alibi": (7, 7, 4, 2, dict(slopes=alibi.slopes(4))),
    "alibi both ways": (7, 7, 4, 2, dict(slopes=alibi.slopes(4), causal=False)),
    "soft cap": (7, 7, 4, 2, dict(soft_cap=0.7)),
    "sinks": (7, 7, 4, 2, dict(sinks=SINKS)),
    "scale": (7, 7, 4, 2, dict(scale=0.3)),
    "padded keys": (5, 5, 4, 2, dict(positions=[[0, 1, 2, -1, -1], [-1, -1, 0, 1, 2]])),
    "prefix": (7, 7, 4, 2, dict(until=PREFIX)),
    "prefix window": (7, 7, 4, 2, dict(until=PREFIX, window=3, slopes=alibi.slopes(4))),
    "images": (7, 7, 4, 1, dict(until=IMAGES, segments=SEGMENTS, positions=RESTARTED, window=2)),
    "everything": (
        7, 7, 4, 2,
        dict(segments=SEGMENTS, positions=RESTARTED, window=3, slopes=alibi.slopes(4),
             soft_cap=2.0, sinks=SINKS, scale=0.5, until=IMAGES),
    ),
}  # fmt: skip


def inputs(case, channels=6):
    t, s, h, k, options = CASES[case]
    options = dict(options)
    rng = np.random.default_rng(0)
    qkv = [
        rng.normal(size=(2, n, heads, channels)).astype(np.float32)
        for n, heads in ((t, h), (s, k), (s, k))
    ]
    both = options.pop("positions", None)
    q_positions = options.pop("q_positions", both)
    where = [
        np.broadcast_to(np.arange(n), (2, n)) if p is None else np.array(p)
        for n, p in ((t, q_positions), (s, both))
    ]
    segments = options.pop("segments", None)
    return qkv, [a.astype(np.int32) for a in where], segments, options


def ours(case, function="layer's"):
    """``(f(q, k, v, sinks) jitted, arguments)`` for one case."""
    qkv, (q_positions, k_positions), segments, options = inputs(case)
    sinks = options.pop("sinks", None)
    slopes = options.pop("slopes", None)
    static = {name: options.pop(name) for name in ("causal", "window") if name in options}
    until = options.pop("until", None)
    mask = Mask(q_positions, k_positions, segments, segments, until, **static)

    def f(q, k, v, sinks):
        return FUNCTIONS[function](q, k, v, mask, alibi_slopes_h=slopes, sinks_h=sinks, **options)

    return f, (*qkv, sinks)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_value_and_gradient_match_float64(function, case):
    f, arguments = ours(case, function)
    qkv, (q_positions, k_positions), segments, options = inputs(case)

    def exact(q, k, v, sinks):
        more = dict(options, sinks=sinks)
        return reference(q, k, v, q_positions, k_positions, segments, segments, **more)

    rng = np.random.default_rng(1)
    wide = [None if a is None else a.astype(np.float64) for a in arguments]
    want = exact(*wide)
    cotangent = rng.normal(size=want.shape)
    kept = tuple(i for i, a in enumerate(arguments) if a is not None)

    @jax.jit
    def value_and_gradient(arguments):
        y, back = jax.vjp(f, *arguments)
        return y, back(jnp.asarray(cotangent, y.dtype))

    got, gradients = value_and_gradient(arguments)
    np.testing.assert_allclose(got, want, atol=3e-6)
    for i in kept:  # the reference's derivative along a random direction, by central difference
        direction, step = rng.normal(size=arguments[i].shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = list(wide)
            moved[i] = moved[i] + sign * step * direction
            ends.append(np.sum(exact(*moved) * cotangent))
        np.testing.assert_allclose(
            np.sum(np.asarray(gradients[i]) * direction),
            (ends[0] - ends[1]) / (2 * step),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    "case", ["multi-head", "grouped", "multi-query", "bidirectional", "more keys", "window",
             "packed window", "alibi", "alibi both ways", "prefix", "prefix window"],
)  # fmt: skip
def test_value_and_gradient_match_torch(case):
    torch = pytest.importorskip("torch")
    f, arguments = ours(case)
    qkv, (q_positions, k_positions), segments, options = inputs(case)
    mask = seen(
        q_positions, k_positions, segments, segments,
        options.get("causal", True), options.get("window"), options.get("until"),
    )  # fmt: skip
    bias = np.where(mask, 0.0, -np.inf)[:, None]
    if "slopes" in options:
        distance = np.abs(q_positions[:, :, None] - k_positions[:, None, :])[:, None]
        bias = bias - options["slopes"][None, :, None, None].astype(np.float64) * distance
    tensors = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in qkv]
    want = torch.nn.functional.scaled_dot_product_attention(
        *(a.transpose(1, 2) for a in tensors), attn_mask=torch.tensor(bias), enable_gqa=True
    ).transpose(1, 2)
    visible = torch.tensor(mask.any(-1))[:, :, None, None]  # torch gives NaN where nothing is
    want = torch.where(visible, want, torch.zeros_like(want))
    cotangent = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    y, back = jax.vjp(f, *arguments)
    np.testing.assert_allclose(y, want.detach().numpy(), atol=3e-6)
    if not mask.any(-1).all():
        return  # torch's gradient is NaN in rows that see nothing; ours is tested below
    want.backward(torch.tensor(cotangent.astype(np.float64)))
    for got, tensor in zip(back(jnp.asarray(cotangent))[:3], tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad.numpy(), atol=2e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_rows_that_see_nothing_give_zero_and_a_finite_gradient(function, sinks):
    (q, k, v), _, _, _ = inputs("grouped")
    nothing = Mask(k_positions_bs=np.full((2, 7), -1, np.int32))

    def f(q, k, v):
        return FUNCTIONS[function](q, k, v, nothing, sinks_h=sinks)

    y, back = jax.vjp(f, q, k, v)
    assert not np.any(y)
    for gradient in back(jnp.ones_like(y)):
        assert not np.any(gradient)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_extreme_scores_stay_finite(function):
    (q, k, v), _, _, _ = inputs("grouped")

    def f(q, k, v):
        return FUNCTIONS[function](q * 1e6, k * 1e6, v, Mask())

    y, back = jax.vjp(f, q, k, v)
    want = reference(q * 1e6, k * 1e6, v, *inputs("grouped")[1])
    np.testing.assert_allclose(y, want, atol=1e-5)  # one key takes all
    assert all(np.all(np.isfinite(g)) for g in back(jnp.ones_like(y)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bfloat16_inputs_keep_float32_scores(function):
    (q, k, v), where, _, _ = inputs("grouped")
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    y = FUNCTIONS[function](q, k, v, Mask())
    assert y.dtype == jnp.bfloat16
    want = reference(*(np.asarray(a, np.float64) for a in (q, k, v)), *where)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=2e-2)


def test_refuses_shapes_that_do_not_go_together():
    (q, k, v), _, _, _ = inputs("grouped")
    ids = np.ones((2, 7), np.int32)
    with pytest.raises(ValueError, match="num_heads=3: must be a multiple of num_kv_heads=2"):
        sharded_attention(q[:, :, :3], k, v, Mask())
    with pytest.raises(ValueError, match=r"v.shape=\(2, 7, 2, 5\): must be \(2, 7, 2, 6\)"):
        sharded_attention(q, k, v[..., :5], Mask())
    with pytest.raises(ValueError, match="window=0: must be > 0"):
        sharded_attention(q, k, v, Mask(window=0))
    with pytest.raises(ValueError, match="segments='one of two'"):
        sharded_attention(q, k, v, Mask(q_segments_bt=ids))
    with pytest.raises(ValueError, match="until='given': changes nothing: requires causal=True"):
        sharded_attention(q, k, v, Mask(until_bt=ids, causal=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=0), "num_heads=0: must be > 0"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads=3: must divide num_heads=4"),
        (dict(num_heads=4, num_kv_heads=0), "num_kv_heads=0: must divide num_heads=4"),
        (dict(num_heads=4, head_dim=-1), "head_dim=-1: must be > 0 or None"),
        (dict(num_heads=4, window=0), "window=0: must be > 0 or None"),
        (
            dict(num_heads=4, qk_norm_across_heads=True),
            "qk_norm_across_heads=True: requires qk_norm=True",
        ),
        (dict(num_heads=4, qk_layernorm=True), "qk_layernorm=True: requires qk_norm=True"),
        (dict(num_heads=4, clip=0.0), "clip=0.0: must be > 0 or None"),
        (dict(num_heads=4, alibi_largest=0), "alibi_largest=0.0: must be > 0"),
        (dict(num_heads=4, soft_cap=0.0), "soft_cap=0.0: must be > 0 or None"),
        (dict(num_heads=4, scale=-2.0), r"scale=-2.0: must be > 0 or None"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        AttentionConfig(**fields)


def test_layer_is_its_projections_around_the_function(rngs):
    """Biases, QK-norm and rotary, against plain matrix products and the float64 reference."""
    config = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, qkv_bias=True, out_bias=True
    )
    layer = Attention(config, 10, rngs=rngs, rotary_config=RotaryConfig())
    leaves, structure = jax.tree.flatten(layer)
    rng = np.random.default_rng(0)
    layer = jax.tree.unflatten(structure, [rng.normal(size=a.shape) * 0.4 for a in leaves])
    x = rng.normal(size=(2, 5, 10))
    where = np.broadcast_to(np.arange(5), (2, 5))
    got, after = layer(jnp.asarray(x, jnp.float32), Context.of_tokens(jnp.asarray(where)))
    assert after.state is None

    def project(linear):
        return np.einsum("btd,dhc->bthc", x, linear.weight[...]) + linear.bias[...]

    def normalise(y, norm):
        return y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])

    def turn(y):
        angles = where[..., None, None] * 10_000.0 ** (-np.arange(0, 6, 2) / 6)
        z = (y[..., :3] + 1j * y[..., 3:]) * np.exp(1j * angles)
        return np.concatenate((z.real, z.imag), -1)

    q = turn(normalise(project(layer.query), layer.query_norm))
    k = turn(normalise(project(layer.key), layer.key_norm))
    y = reference(q, k, project(layer.value), where, where)
    want = np.einsum("bthc,hcd->btd", y, layer.out.weight[...]) + layer.out.bias[...]
    np.testing.assert_allclose(got, want, atol=2e-5)
