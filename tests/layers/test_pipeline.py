"""Circuits stack parameters apart and change nothing else."""

import dataclasses

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
from layers.pipeline import idle
from layers.routing import MoeConfig
from layers.stack import rearranged, unstacked
from research.models import load, save

WHOLE = DecoderConfig(
    vocab_size=13,
    width=8,
    num_layers=12,
    attention=AttentionConfig(num_heads=4, window=3),
    mlp=MlpConfig(12),
    moe=MoeConfig(4, 6, router="sigmoid", bias_rate=0.5),
    pattern=("sliding", "attention"),
    feed_forward=("mlp", "moe"),
    init_std=0.5,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 6)), jnp.int32)


def make(circuits: int, **changes) -> Decoder:
    config = dataclasses.replace(WHOLE, circuits=circuits, **changes)
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


def test_circuits_change_neither_logits_nor_taps_nor_what_is_cached():
    one, three = make(1), make(3)
    # an edit of each layer by its index, which goes on counting in the next circuit
    edit = {"mixer.output": lambda x, layer: x * (1 + 0.1 * layer)}
    hooks = Hooks(capture=("residual",), edit=edit)
    want, got = (jax.jit(lambda m: m(TOKENS, hooks=hooks))(m) for m in (one, three))
    np.testing.assert_allclose(got.logits_btv, want.logits_btv, atol=1e-5)
    np.testing.assert_allclose(got.taps["residual"], want.taps["residual"], atol=1e-5)
    for a, b in zip(jax.tree.leaves(got.aux), jax.tree.leaves(want.aux), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    state, parts = three.init_state(2, 6), []
    for part in (slice(0, 4), slice(4, 6)):
        positions = jnp.arange(6)[None, part]
        output = three(TOKENS[:, part], positions, state=state, hooks=Hooks(edit=edit))
        state = output.state
        parts.append(output.logits_btv)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want.logits_btv, atol=1e-5)


def test_router_biases_move_by_their_own_layers_counts():
    one, three = make(1), make(3)
    counts = jnp.asarray(np.random.default_rng(1).integers(0, 9, (6, 4)))
    listed = unstacked(one)
    for model in (one, three, listed):
        model.rebalance(counts)
    for other, join in ((three, jnp.concatenate), (listed, jnp.stack)):
        moved = join([m.bias[...] for m in other.mixtures])
        np.testing.assert_array_equal(moved, one.mixtures[0].bias[...])
    assert len(np.unique(one.mixtures[0].bias[...], axis=0)) > 1


def test_checkpoints_of_others_are_read_into_circuits_and_written_from_them(tmp_path):
    plain = dict(moe=None, feed_forward=("mlp",), pattern=("attention",), norm_eps=1e-6)
    model = make(2, attention=AttentionConfig(num_heads=4), **plain)
    save(model, tmp_path / "two", "llama")
    one, four = load(tmp_path / "two"), load(tmp_path / "two", circuits=4)
    assert (len(one.blocks), len(four.blocks)) == (1, 4)
    for other in (one, four):
        np.testing.assert_allclose(other(TOKENS).logits_btv, model(TOKENS).logits_btv, atol=1e-5)


def test_places_of_layers():
    config = dataclasses.replace(WHOLE, circuits=3)
    assert [config.locate(i) for i in range(6)] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0)]
    blocks = [(b, i) for b, block in enumerate(make(3).blocks) for i in range(_rows(block))]
    assert sorted(map(config.locate, range(12))) == blocks


@pytest.mark.parametrize("layout", [(True, 2), (True, 6), (False, 1)])
def test_layers_rearranged_are_the_layers(layout):
    scan, circuits = layout
    three = make(3)
    other = rearranged(three, scan=scan, circuits=circuits)
    made = jax.eval_shape(lambda: make(circuits, scan=scan))
    assert jax.tree.structure(other) == jax.tree.structure(made)
    pairs = zip(jax.tree.leaves(other), jax.tree.leaves(made), strict=True)
    assert all(a.shape == b.shape for a, b in pairs)
    back = rearranged({"a": other}, scan=True, circuits=3)["a"]
    jax.tree.map(np.testing.assert_array_equal, back, three)
    assert three.config.circuits == 3


def _rows(block) -> int:
    return jax.tree.leaves(block)[0].shape[0]


def test_circuits_divide_the_repeats():
    with pytest.raises(ConfigError, match="^circuits=4: must divide the pattern's 6 repeats"):
        dataclasses.replace(WHOLE, circuits=4)
    with pytest.raises(ConfigError, match="^circuits=3: must be 1 with scan=False"):
        dataclasses.replace(WHOLE, circuits=3, scan=False)


def test_idle_share():
    """Narayanan 2021, §2.2: (p − 1)/m of the ideal time, and 1/v of that with v chunks a device."""
    for stages, parts, circuits in ((4, 8, 1), (8, 32, 4)):
        wasted = idle(stages, parts, circuits) / (1 - idle(stages, parts, circuits))
        assert wasted == pytest.approx((stages - 1) / parts / circuits)
