"""Held-out metrics are sums over all batches, divided once."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig
from research.training import evaluate
from tests.research.training.test_source import OnPolicy

MODEL = DecoderConfig(16, 8, 1, attention=AttentionConfig(2), mlp=MlpConfig(12), scan=False)


class Uneven:
    """Two batches, the first with few labels and the second with many."""

    name, batch_size = "uneven", 2

    def held_out(self, batches):
        rng = np.random.default_rng(0)
        for share in (0.2, 0.9)[:batches]:
            ids = rng.integers(0, 16, (2, 9)).astype(np.int32)
            yield dict(
                tokens=ids[:, :-1],
                targets=ids[:, 1:],
                positions=np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)),
                segment_ids=np.ones((2, 8), np.int32),
                weights=(rng.random((2, 8)) < share).astype(np.float32),
            )


def test_a_source_without_held_out_batches_is_refused():
    with pytest.raises(ConfigError, match="^batches=2: must be 0: toy has no held-out batches"):
        evaluate(None, OnPolicy(), batches=2)


def test_text_with_more_ids_than_the_model_is_refused():
    with pytest.raises(ConfigError, match="model.vocab_size=16: must be at least .* data, 258"):
        evaluate(jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))), DataConfig(), batches=1)


def test_every_label_weighs_the_same():
    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
    nats, right, labels = [], [], []
    for batch in Uneven().held_out(2):
        logits = np.asarray(model(batch["tokens"]).logits_btv, np.float64)
        target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        chosen = batch["weights"] > 0
        nats += (np.log(np.exp(logits).sum(-1)) - target)[chosen].tolist()
        right += (logits.argmax(-1) == batch["targets"])[chosen].tolist()
        labels.append(chosen.sum())
    assert 0 < labels[0] < labels[1] / 2
    found = evaluate(model, Uneven(), batches=2)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(right))
