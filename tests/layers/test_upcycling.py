"""Upcycled models against the dense ones they were made of (Komatsuzaki 2022, §3)."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.upcycling import upcycle

DENSE = DecoderConfig(
    vocab_size=13,
    width=8,
    num_layers=6,
    attention=AttentionConfig(2, window=3),
    mlp=MlpConfig(12),
    pattern=("attention", "sliding"),
)
MOE = MoeConfig(4, 12)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 13)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(DENSE, rngs=nnx.Rngs(0)))()


@jax.jit
def logits(model):
    return model(TOKENS).logits_btv


@pytest.mark.parametrize("feed_forward", [("moe",), ("mlp", "moe"), ("mlp", "mlp", "moe")], ids=len)
def test_it_computes_what_it_was_made_of(model, feed_forward):
    """Every expert is the MLP; the layers keep their order in the longer pattern."""
    grown = upcycle(model, MOE, feed_forward, key=jax.random.key(0))
    count = 6 * feed_forward.count("moe") // len(feed_forward)
    assert sum(moe.up[...].shape[0] for moe in grown.mixtures) == count
    np.testing.assert_allclose(logits(grown), logits(model), atol=1e-5)


def test_routers_are_fresh_and_experts_can_part(model):
    """Were the experts one array, or the routers equal, they would stay alike for ever."""
    one, other = (upcycle(model, MOE, key=jax.random.key(k)) for k in range(2))
    assert np.any(one.mixtures[0].router.weight[...] != other.mixtures[0].router.weight[...])

    def loss(model):
        return jax.numpy.sum(jax.numpy.sin(model(TOKENS).logits_btv))

    up = jax.jit(jax.grad(loss))(one).mixtures[0].up[...]
    assert np.abs(up[:, 0] - up[:, 1]).max() > 1e-4


@pytest.mark.parametrize(
    "moe, feed_forward, message",
    [
        (MoeConfig(4, 11), ("moe",), "moe.width=11: must be mlp.width=12"),
        (MoeConfig(4, 12, activation="relu"), ("moe",), "moe.activation='relu': must be mlp.act"),
        (MoeConfig(4, 12, shared_experts=1), ("moe",), "moe.shared_experts=1: must be 0"),
        (MOE, ("mlp",), r"feed_forward=\('mlp',\): must name 'moe'"),
        (MOE, ("moe", "mlp", "mlp", "mlp"), "num_layers=6: must be a multiple of .* length 4"),
    ],
)
def test_what_cannot_be_is_refused(model, moe, feed_forward, message):
    with pytest.raises(ConfigError, match=message):
        upcycle(model, moe, feed_forward, key=jax.random.key(0))


def test_a_model_without_mlps_is_refused(model):
    config = dataclasses.replace(DENSE, moe=MOE, feed_forward=("moe",))
    with pytest.raises(ConfigError, match=r"feed_forward=\('moe',\): must be all mlp"):
        upcycle(Decoder(config, rngs=nnx.Rngs(0)), MOE, key=jax.random.key(0))
