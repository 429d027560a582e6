"""The step's numbers against float64, and what a run refuses before it compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.training import OptimizerConfig, TrainingConfig, train
from research.training.flops import train_flops_per_token
from research.training.metrics import Metrics
from research.training.objectives import NextToken, cross_entropy
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import make_step

MODEL = DecoderConfig(
    vocab_size=16,
    width=8,
    num_layers=2,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(12),
    scan=False,
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=8,
    batch_size=4,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)
# plain gradient descent at rate 1, so that the change of a weight is its gradient
DESCENT = OptimizerConfig(
    name="sgd", learning_rate=1.0, schedule="constant", b1=0.0, weight_decay=0.0, clip_norm=None
)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 16, (4, 9)).astype(np.int32)
    return dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8)),
        segment_ids=np.ones((4, 8), np.int32),
        # uneven: the micro-batches must not weigh alike
        weights=(rng.random((4, 8)) * np.array([[0.1], [1.0], [3.0], [0.0]])).astype(np.float32),
    )


def after_one_step(model, batch, **options):
    training = TrainingConfig(steps=5, **{"optimizer": DESCENT, **options})
    optimizer = make_optimizer(training.optimizer, training.steps)
    # a copy, for the step takes its argument's memory
    state = TrainState.begin(jax.tree.map(jnp.copy, model), optimizer, 0)
    return make_step(training)(state, batch)


def test_loss_accuracy_and_z_loss_against_float64(model, batch):
    logits = np.asarray(model(batch["tokens"]).logits_btv, np.float64)
    norm = np.log(np.exp(logits).sum(-1))
    nats = norm - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    w = batch["weights"].astype(np.float64)
    total, tokens, sums = NextToken(0.01)(model, batch)
    right = logits.argmax(-1) == batch["targets"]
    for name, value in dict(loss=nats, z_loss=norm**2, accuracy=right).items():
        np.testing.assert_allclose(sums[name], (value * w).sum(), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, ((nats + 0.01 * norm**2) * w).sum(), rtol=1e-5)
    _, metrics = after_one_step(model, batch)
    np.testing.assert_allclose(metrics["loss"], (nats * w).sum() / w.sum(), rtol=1e-5)
    assert float(metrics["weight"]) == pytest.approx(w.sum())


def test_cross_entropy_of_extreme_logits_is_exact_and_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    for target, nats in enumerate((0.0, 2e4, 1e4)):
        got, _ = cross_entropy(logits, jnp.array([[target]]))
        assert float(got[0, 0]) == nats


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(model, batch, parts):
    whole, want = after_one_step(model, batch, z_loss=0.1)
    split, got = after_one_step(model, batch, z_loss=0.1, gradient_accumulation=parts)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
    changed = 0.0
    for before, a, b in zip(*map(jax.tree.leaves, (model, whole.model, split.model)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        changed = max(changed, float(jnp.abs(a - before).max()))
    assert changed > 0.01


def test_a_gradient_is_clipped_to_its_norm(model, batch):
    free, metrics = after_one_step(model, batch)
    norm = float(metrics["gradient_norm"])
    clip = dataclasses.replace(DESCENT, clip_norm=norm / 4)
    clipped, metrics = after_one_step(model, batch, optimizer=clip)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm)
    for before, a, b in zip(*map(jax.tree.leaves, (model, free.model, clipped.model)), strict=True):
        np.testing.assert_allclose(b - before, (a - before) / 4, atol=1e-6)


def test_a_batch_of_padding_changes_nothing(model, batch):
    empty = {
        **batch,
        "positions": np.full((4, 8), -1, np.int32),
        "segment_ids": np.zeros((4, 8), np.int32),
        "weights": np.zeros((4, 8), np.float32),
    }
    state, metrics = after_one_step(model, empty)
    assert np.isfinite(float(metrics["loss"]))
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_computes_and_float32_keeps():
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    result = train(config, DATA, TrainingConfig(steps=3, eval_batches=1), progress=lambda *_: None)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.model)} == {jnp.dtype("float32")}
    # bfloat16 steps of 1e-3 would vanish beside weights of order 1
    fresh = Decoder(config, rngs=nnx.Rngs(0))
    assert np.any(np.asarray(fresh.final_norm.scale[...] != result.model.final_norm.scale[...]))


@pytest.mark.parametrize(
    "model, data, training, message",
    [
        (
            dict(vocab_size=15), {}, {},
            "model.vocab_size=15: must be at least the vocabulary of the data, 16",
        ),
        (
            dict(position="learned", max_length=7), {}, {},
            "data.sequence_length=8: must be at most model.max_length=7",
        ),
        ({}, {}, dict(gradient_accumulation=3), "gradient_accumulation=3: must divide the 4 rows"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(model, data, training, message, monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("compiled before the check")

    monkeypatch.setattr(jax, "jit", compiled)
    with pytest.raises(ConfigError, match=message):
        train(
            dataclasses.replace(MODEL, **model),
            dataclasses.replace(DATA, **data),
            TrainingConfig(steps=1, **training),
        )


def test_metrics_drop_what_came_after_the_checkpoint_and_half_a_line(tmp_path):
    log = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        log.write("metrics", step, {"loss": 1 / step})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    log = Metrics(tmp_path, 2)
    log.write("metrics", 3, {"loss": 0.5})
    log.close()
    assert path.read_text().splitlines() == [
        '{"step": 1, "loss": 1.0}',
        '{"step": 2, "loss": 0.5}',
        '{"step": 3, "loss": 0.5}',
    ]


def test_flops_of_a_token_by_hand():
    config = dataclasses.replace(
        MODEL,
        pattern=("attention", "sliding"),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=3),
    )
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # query, key and value of one head, output
    weights = 2 * (attention + 3 * 8 * 12 + 2 * 8) + 8 + 16 * 8  # norms, tied table
    keys = (1 + 2 + 3 + 4 + 5) / 5 + (1 + 2 + 3 + 3 + 3) / 5
    # a score and its value are 2 · 2 · width FLOPs a key, three times that with the backward
    assert train_flops_per_token(model, 5) == pytest.approx(6 * weights + 12 * 8 * keys)
