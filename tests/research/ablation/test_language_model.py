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
from research.ablation.language_model import check_unit, language_model, train_unit
from research.ablation.measure import check_decoding
from research.ablation.overrides import assign_text
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


@pytest.mark.parametrize(
    "text, value",
    [
        ("training.optimizer.clip_norm=None", None),
        ("training.optimizer.clip_norm=0.5", 0.5),
        ("mesh.zero=2", 2),
        ("mesh.zero=None", None),
        ("model.logit_cap=30", 30),
        ("data.hf_subset=None", None),
        ("data.paths=a.txt", ("a.txt",)),
        ("data.paths=a.txt,b.txt", ("a.txt", "b.txt")),
        ("data.paths=a.txt, b.txt,", ("a.txt", "b.txt")),
        ("data.paths=('a.txt','b,c.txt')", ("a.txt", "b,c.txt")),
        ("data.paths=()", ()),
        ("model.pattern=mamba,attention", ("mamba", "attention")),
        ("training.steps=9223372036854775807", 2**63 - 1),
    ],
)
def test_a_field_takes_what_its_declaration_allows(text, value):
    config = language_model("smoke").lock()
    node = config
    for name in assign_text(config, text).split("."):
        node = node[name]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("training.optimizer.learning_rate=None", "learning_rate=None: must be float, like"),
        ("training.steps=None", "training.steps=None: must be int"),
    ],
)
def test_a_field_refuses_what_its_declaration_does_not_allow(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        assign_text(language_model("smoke").lock(), text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model.width": 0}, "model.width=0: must be > 0"),
        ({"model.vocab_size": 63}, "model.vocab_size=63: must be at least the vocabulary of the"),
        ({"model.width": 10**10}, "model=.* parameters: with gradients and moments, .* of memory"),
        ({"mesh.tensor": 7}, "mesh=data=-1 × tensor=7: 7 must divide the number of devices"),
        ({"data.batch_size": 10**12}, "data.batch_size=.* of memory"),
        (
            {"data.source": "files", "data.paths": ("/nope",), "model.vocab_size": 300},
            "/nope",
        ),
    ],
)
def test_a_unit_is_checked_before_it_runs(unit, fields, message):
    check_unit(unit)
    for field, value in fields.items():
        *parents, name = field.split(".")
        node = unit.config
        for parent in parents:
            node = node[parent]
        node[name] = value
    with pytest.raises(ConfigError, match=message) as caught:
        check_unit(unit)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as trained:  # the same as without the check
        train_unit(unit)
    assert str(trained.value) == str(caught.value) and not list(unit.workdir.iterdir())


def test_steps_to_trace_and_labels_are_checked_before(unit, monkeypatch):
    with pytest.raises(ConfigError, match="profile='2:9': must be FIRST:END with .* ≤ 3$"):
        check_unit(dataclasses.replace(unit, profile=(2, 9)))
    empty = [{"weights": np.zeros(3)}]
    monkeypatch.setattr(language_model_module, "make_dataset", lambda data, split: empty)
    with pytest.raises(ConfigError, match="data='synthetic': its held-out split has no labels"):
        check_unit(unit)


def test_a_process_without_a_held_out_row_passes_as_the_others_do(unit, monkeypatch):
    unit.config.data.synthetic.validation_examples = 1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in (0, 1):  # the share of the second is padding
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        check_unit(unit)


@pytest.mark.parametrize(
    "batch, lengths, message",
    [
        (0, (16,), "batch=0: must be > 0"),
        (1, (16, 0), "length=0: must be > 0"),
        (1, (16, 200), "length=200: must be a multiple of 128"),
        (1, (128 * 10**12,), "length=.*: a state of .* GB must fit into .* of memory"),
    ],
)
def test_decoding_is_checked_before(unit, batch, lengths, message):
    check_decoding(unit, 2, 16, 256)
    with pytest.raises(ConfigError, match=message):
        check_decoding(unit, batch, *lengths)
