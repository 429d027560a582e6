"""The loss through a cache: against the loss without one, float64 NumPy, and decoding by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.cache import KVCache
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig
from research.inference.cached_loss import CachedNextToken, Rounding, rounded
from research.training import NextToken

ATTENTION = AttentionConfig(2, 1, head_dim=8, implementation="reference")
CONFIG = DecoderConfig(19, 16, 2, attention=ATTENTION, mlp=MlpConfig(24), scan=False)
ROWS, TIME, GROUP = 2, 10, 4


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def batch():
    ids = np.random.default_rng(0).integers(0, 19, (ROWS, TIME + 1)).astype(np.int32)
    segments = np.array([[1] * 4 + [2] * 6, [1] * 8 + [0] * 2])
    positions = np.array([[*range(4), *range(6)], [*range(8), -1, -1]])
    return dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=positions.astype(np.int32),
        segment_ids=segments.astype(np.int32),
        weights=(positions >= 0).astype(np.float32),
    )


def loss(objective, model, batch) -> float:
    sums = jax.jit(objective)(model, batch)
    return float(sums.total / sums.denominator)


def level64(x, bits, axis):
    """`rounded` in float64 NumPy."""
    x = np.asarray(x, np.float64)
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    levels = low + (high - low) * np.arange(2**bits).reshape(-1, *[1] * x.ndim) / (2**bits - 1)
    nearest = np.abs(x - levels).argmin(axis=0)
    return np.take_along_axis(np.broadcast_to(levels, (2**bits, *x.shape)), nearest[None], 0)[0]


@pytest.mark.parametrize("bits, axis", [(2, -1), (4, -2), (3, 0)])
def test_rounding_takes_the_nearest_level(bits, axis):
    x = jax.random.normal(jax.random.key(0), (3, 5, 7))
    np.testing.assert_allclose(rounded(x, bits, axis), level64(x, bits, axis), atol=2e-6)
    constant = jnp.full((2, 4), 3.0)
    np.testing.assert_array_equal(rounded(constant, bits), constant)


@pytest.mark.parametrize("rounding", [None, Rounding(16), Rounding(16, "channel", GROUP)], ids=str)
def test_an_exact_cache_changes_nothing(model, batch, rounding):
    cached = loss(CachedNextToken(rounding=rounding), model, batch)
    assert cached == pytest.approx(loss(NextToken(), model, batch), abs=1e-4)


def test_rounding_by_token_is_the_cache_of_that_dtype(model, batch):
    """int4 is stored with a minimum and a scale for each token and head."""
    stored = loss(CachedNextToken(cache=CacheConfig(dtype="int4")), model, batch)
    assert loss(CachedNextToken(rounding=Rounding(4)), model, batch) == pytest.approx(stored)
    exact = loss(NextToken(), model, batch)
    coarse = loss(CachedNextToken(rounding=Rounding(2)), model, batch)
    assert abs(coarse - exact) > abs(stored - exact) > 1e-6


@pytest.mark.parametrize("keys", ["token", "channel"])
def test_groups_are_those_of_decoding_token_by_token(model, batch, keys):
    """Each complete group is rounded in NumPy; the tokens of the last one are exact."""
    step = jax.jit(lambda *inputs: model(*inputs)[:2])
    state, nats = model.init_state(ROWS, TIME), []
    for i in range(TIME):
        some = slice(i, i + 1)
        inputs = (batch[name][:, some] for name in ("tokens", "positions", "segment_ids"))
        logits_btv, state = step(*inputs, state)
        logits = np.asarray(logits_btv[:, 0], np.float64)
        target = np.take_along_axis(logits, batch["targets"][:, some], -1)[:, 0]
        nats.append(np.log(np.exp(logits).sum(-1)) - target)
        if (i + 1) % GROUP == 0:
            group = slice(i + 1 - GROUP, i + 1)

            def change(stored, axis, group=group):
                codes = np.array(stored.codes)
                codes[:, :, group] = level64(codes[:, :, group], 3, axis)
                return dataclasses.replace(stored, codes=jnp.asarray(codes))

            def of_layer(layer, change=change):
                by_key = -2 if keys == "channel" else -1
                changed = dict(keys=change(layer.keys, by_key), values=change(layer.values, -1))
                return dataclasses.replace(layer, **changed)

            state = jax.tree.map(of_layer, state, is_leaf=lambda node: isinstance(node, KVCache))
    expected = np.sum(np.stack(nats, 1) * batch["weights"]) / batch["weights"].sum()
    found = loss(CachedNextToken(rounding=Rounding(3, keys, GROUP)), model, batch)
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - loss(NextToken(), model, batch)) > 1e-4


def test_a_scanned_stack_is_rounded_as_an_unrolled_one(batch):
    losses = []
    for scan in (False, True):
        config = dataclasses.replace(CONFIG, scan=scan)
        model = jax.jit(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))()
        objective = CachedNextToken(rounding=Rounding(2, "channel", GROUP))
        losses.append(loss(objective, model, batch))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_bytes_are_codes_and_scales():
    """The example of 4 bits in `pallas_kernels.stored`: half a byte a channel, two numbers each."""
    stored = jax.eval_shape(lambda: KVCache.empty(1, 1, 1, 64, "int4", rolling=False))
    counted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        (stored.keys, stored.values)))  # fmt: skip
    assert Rounding(4).bytes_per_token(64) == counted
    # keys: 64 channels of 2 bits, and 64 pairs of numbers for 32 tokens
    assert Rounding(2, "channel", 32).bytes_per_token(64) == 16 + 64 * 8 / 32 + 16 + 8


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Rounding(0), "bits=0: must be in"),
        (lambda: Rounding(4, "head"), "keys='head'"),
        (lambda: Rounding(4, "channel"), "group=1: must be > 1 with keys='channel'"),
        (lambda: Rounding(4, group=0), "group=0: must be > 0"),
    ],
)
def test_impossible_roundings_are_one_line(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_groups_require_contiguous_floating_caches(model, batch):
    rounding = Rounding(2, "channel", GROUP)
    objective = CachedNextToken(cache=CacheConfig(dtype="int8"), rounding=rounding)
    with pytest.raises(ConfigError, match="rounding.group=4: requires contiguous floating caches"):
        jax.eval_shape(objective, model, batch)
