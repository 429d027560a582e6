"""The standard subject with an objective, a source and a trainable part of an experiment's own."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from layers.config import ConfigError, from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.weights import flat
from research.ablation import language_model as language_model_module
from research.ablation import load
from research.ablation.experiment import Arm, Unit
from research.ablation.language_model import language_model, train_unit
from research.data import train_bpe
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


@pytest.fixture
def tokenizer(tmp_path):
    train_bpe(["the cat sat on the mat"], 270, tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("stated, vocabulary", [(None, 270), (512, 512), (258, 258)])
def test_the_vocabulary_is_that_of_the_tokenizer_unless_it_is_stated(stated, vocabulary, tokenizer):
    experiment = load("architecture/gqa")
    assert experiment.config("smoke").model.vocab_size == 258
    overrides = [f"data.tokenizer={tokenizer}", f"model.vocab_size={stated}"]
    config: Any = experiment.config("smoke", overrides)
    assert config.model.vocab_size == vocabulary
    arm: Any = experiment.arm_config(config, experiment.arms[0])
    assert arm.model.vocab_size == vocabulary


def test_an_arm_with_another_tokenizer_may_have_its_vocabulary(tokenizer):
    experiment = load("architecture/gqa")
    changed = {"data.tokenizer": tokenizer, "model.vocab_size": None}
    arm: Any = experiment.arm_config(experiment.config("smoke"), Arm("words", changed))
    assert arm.model.vocab_size == 270


def test_too_small_a_vocabulary_names_both_numbers(unit, tokenizer):
    unit.config.data.update(source="stdlib", tokenizer=tokenizer)
    message = "model.vocab_size=64: must be at least the vocabulary of the data, 270"
    with pytest.raises(ConfigError, match=message):
        train_unit(unit)


def test_a_tokenizer_that_cannot_be_read_is_named():
    with pytest.raises(ConfigError, match="tokenizer='gone.json': must be"):
        load("architecture/gqa").config("smoke", ["data.tokenizer=gone.json"])
