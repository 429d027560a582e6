"""The standard subject with an objective, a source and a trainable part of an experiment's own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from layers.config import ConfigError, from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.weights import flat
from research.ablation import language_model as language_model_module
from research.ablation.experiment import Unit
from research.ablation.language_model import language_model, train_unit
from research.training import NextToken
from tests.research.training.test_source import OnPolicy


@pytest.fixture
def unit(tmp_path):
    config = language_model("smoke")
    config.data.source = "synthetic"
    config.data.synthetic.update(task="copy", vocab_size=64)
    config.model.vocab_size = 64
    config.training.steps = 2
    return Unit(config, "arm", 0, tmp_path)


def test_a_unit_is_trained_by_an_objective_on_a_source(unit):
    unit.config.training.eval_batches = 0
    source = OnPolicy()
    result = train_unit(unit, objective=NextToken(0.1), source=source, trainable=("blocks/*",))
    assert sorted(source.given) == [1, 2] and "z_loss" in result.metrics
    config = from_mapping(DecoderConfig, unit.config.model, "model")
    fresh = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(jax.random.key(0))))()
    changed = {
        path.partition("/")[0]
        for path, array in flat(fresh).items()
        if not np.array_equal(array, flat(result.model)[path])
    }
    assert changed == {"blocks"}


def test_what_a_unit_cannot_be_trained_by_is_refused(unit):
    with pytest.raises(ConfigError, match="training.eval_batches=2: must be 0: toy has no held-"):
        train_unit(unit, source=OnPolicy())


@pytest.mark.parametrize("source", [None, OnPolicy()])
def test_a_unit_accepts_changed_data_where_it_reads_data(source, unit, monkeypatch):
    given = {}
    monkeypatch.setattr(language_model_module, "train", lambda *_, **options: given.update(options))
    train_unit(dataclasses.replace(unit, accept_changed_data=True), source=source)
    assert given["accept_changed_data"] == (source is None)
