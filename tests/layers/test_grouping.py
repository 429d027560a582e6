"""Multi-head to grouped-query conversion (Ainslie 2023, §2.1) against NumPy, and its meaning."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.grouping import group_kv_heads
from layers.mlp import MlpConfig

CONFIG = DecoderConfig(
    vocab_size=31,
    width=16,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, qkv_bias=True),
    mlp=MlpConfig(24),
)


@pytest.fixture(scope="module")
def model():
    # biases begin at 0: noise, so that a mistake in them shows
    leaves, tree = jax.tree.flatten(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize("method", ["mean", "first"])
def test_heads_are_pooled_by_neighbours(model, method):
    grouped = group_kv_heads(model, 2, method)
    assert grouped.config.attention.num_kv_heads == 2
    for name in ("key", "value"):
        for part in ("weight", "bias"):
            old = np.asarray(getattr(getattr(model.blocks[0].mixer, name), part)[...], np.float64)
            new = np.asarray(getattr(getattr(grouped.blocks[0].mixer, name), part)[...])
            pairs = [old[..., 0:2, :], old[..., 2:4, :]]
            pooled = [p.mean(-2) if method == "mean" else p[..., 0, :] for p in pairs]
            np.testing.assert_allclose(new, np.stack(pooled, axis=-2), rtol=1e-6)
    query = model.blocks[0].mixer.query.weight[...]
    np.testing.assert_array_equal(grouped.blocks[0].mixer.query.weight[...], query)


@pytest.mark.parametrize("method", ["mean", "first"])
def test_a_model_whose_groups_share_heads_already_keeps_its_logits(model, method):
    attention = dataclasses.replace(CONFIG.attention, num_kv_heads=2)
    shared = Decoder(dataclasses.replace(CONFIG, attention=attention), rngs=nnx.Rngs(2))
    target = jax.tree.structure(Decoder(CONFIG, rngs=nnx.Rngs(0)))

    def repeat(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf.repeat(2, axis=-2) if ".mixer.key" in name or ".mixer.value" in name else leaf

    flat = jax.tree_util.tree_flatten_with_path(shared)[0]
    multi_head = jax.tree.unflatten(target, [repeat(path, leaf) for path, leaf in flat])
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 31)
    want = shared(tokens).logits_btv
    np.testing.assert_allclose(multi_head(tokens).logits_btv, want, atol=1e-5)
    grouped = group_kv_heads(multi_head, 2, method)
    np.testing.assert_allclose(grouped(tokens).logits_btv, want, atol=1e-5)


def test_random_heads_are_fresh_and_the_rest_is_kept(model):
    a, b = (group_kv_heads(model, 1, "random", key=jax.random.key(i)) for i in (0, 1))
    keys = [m.blocks[0].mixer.key.weight[...] for m in (a, b)]
    assert keys[0].shape == (2, 16, 1, 4)
    assert not np.array_equal(*keys)
    np.testing.assert_array_equal(a.embedding.table[...], model.embedding.table[...])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3,), "num_kv_heads=3: must divide the model's 4"),
        ((8,), "num_kv_heads=8: must divide the model's 4"),
        ((2, "media"), "method='media': must be one of mean, first, random"),
        ((2, "random"), "key=None: is required by method='random'"),
    ],
)
def test_what_cannot_be_converted_is_refused(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        group_kv_heads(model, *arguments)
