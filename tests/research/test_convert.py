"""``ablate import`` and ``ablate export``: there, and back to where it came from."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.cli import main
from research.convert import export_checkpoint, import_directory
from research.data import DataConfig, SyntheticConfig
from research.models import load, save
from research.training import TrainingConfig, load_model, save_model, train
from research.training.checkpoint import Checkpoints
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from tests.research.models.conftest import TOKENS, logits_of, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = DecoderConfig(
    16, 8, 2, attention=AttentionConfig(2), mlp=MlpConfig(12), tie_embeddings=False
)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """These tests compile much and compute little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def source(tmp_path):
    """A Qwen 3 with a tokenizer, and special tokens that its weights know nothing of."""
    directory = tmp_path / "source"
    make("qwen3").save_pretrained(directory)
    described = json.loads((directory / "config.json").read_text())
    described |= dict(eos_token_id=[7, 8], bos_token_id=9, initializer_range=0.5)
    (directory / "config.json").write_text(json.dumps(described))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "merges.txt").write_text("a b")
    return directory


def equal(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["gemma3", "rwkv", "gpt_neox"])
def test_there_and_back_transformers_computes_the_same(name, tmp_path, capsys):
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "in")
    there, back = str(tmp_path / "there"), str(tmp_path / "new" / "back")
    assert main(["import", str(tmp_path / "in"), "--to", there]) == 0
    assert main(["export", there, "--to", back]) == 0
    said = f"written: {there}\nparameters: float32\nwritten: {back}\n"
    assert capsys.readouterr().out == said
    equal(load_model(there), load(tmp_path / "in"))
    again = type(theirs).from_pretrained(back, attn_implementation="eager")
    np.testing.assert_array_equal(logits_of(again, TOKENS[:1]), logits_of(theirs, TOKENS[:1]))


def test_everything_beside_the_weights_comes_back(source, tmp_path):
    import_directory(source, tmp_path / "there")
    export_checkpoint(tmp_path / "there", tmp_path / "back")
    before, after = (
        json.loads((directory / "config.json").read_text())
        for directory in (source, tmp_path / "back")
    )
    assert {name: after[name] for name in before} == before
    for name in ("tokenizer.json", "merges.txt"):
        assert (tmp_path / "back" / name).read_text() == (source / name).read_text()
    tensors = [load_file(d / "model.safetensors") for d in (source, tmp_path / "back")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensor, tensors[1][name])


def test_parameters_keep_the_dtype_they_came_in_or_get_the_one_asked_for(tmp_path, capsys):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    for name, options, said in (
        ("kept", (), "bfloat16; training updates a float32 copy"),
        ("wide", ("--param-dtype=float32",), "float32\n"),
        ("half", ("--param-dtype=float16",), "float16; training does not support it"),
    ):
        assert main(["import", str(tmp_path / "in"), "--to", str(tmp_path / name), *options]) == 0
        assert f"parameters: {said}" in capsys.readouterr().out
    for name, dtype in (("kept", "bfloat16"), ("wide", "float32"), ("half", "float16")):
        leaves = jax.tree.leaves(load_model(tmp_path / name))
        assert {leaf.dtype for leaf in leaves} == {np.dtype(dtype)}
    export_checkpoint(tmp_path / "kept", tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_run_of_our_own_is_exported_as_the_family_that_is_named(tmp_path):
    model, training = Decoder(SMALL, rngs=nnx.Rngs(0)), TrainingConfig(steps=2)
    run = tmp_path / "run"
    run.mkdir()
    described = {"model": dataclasses.asdict(SMALL), "training": dataclasses.asdict(training)}
    (run / "config.json").write_text(json.dumps(described))
    checkpoints = Checkpoints(run / "checkpoints", 1)
    optimizer = make_optimizer(training.optimizer, training.steps)
    checkpoints.save(2, TrainState.begin(model, optimizer, 0), {}, None)
    checkpoints.close()
    with pytest.raises(ConfigError, match="family=None: not an imported model: must be one"):
        export_checkpoint(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="a Olmo2ForCausalLM would have"):
        export_checkpoint(run, tmp_path / "out", family="olmo2")
    assert not (tmp_path / "out").exists()
    export_checkpoint(run, tmp_path / "out", family="llama")
    equal(load(tmp_path / "out"), model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    got = model(TOKENS[:1] % 16).logits_btv
    np.testing.assert_allclose(got, logits_of(again, TOKENS[:1] % 16), atol=1e-5)


def test_an_imported_model_is_no_run_to_go_on_with(tmp_path):
    save_model(Decoder(SMALL, rngs=nnx.Rngs(0)), tmp_path / "there")
    task = SyntheticConfig(task="copy", vocab_size=16)
    data = DataConfig(source="synthetic", sequence_length=8, batch_size=8, synthetic=task)
    with pytest.raises(ConfigError, match="was begun with None"):
        train(SMALL, data, TrainingConfig(steps=2), workdir=tmp_path / "there")


def without(name):
    def change(source):
        path = source / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path)

    return change


def with_field(name, value):
    def change(source):
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            with_field("architectures", ["Bamba"]),
            "architecture='Bamba': must be one of LlamaForCausalLM",
        ),
        (with_field("dtype", "float64"), "dtype='float64': must be one of float32"),
        (with_field("dtype", ["float32"]), "dtype=['float32']: must be a text"),
        (without("model.norm.weight"), "tensor='model.norm.weight': is missing"),
        (lambda source: (source / "config.json").unlink(), "must hold config.json"),
    ],
)
def test_an_import_that_fails_leaves_nothing(source, change, message, tmp_path, capsys):
    change(source)
    assert main(["import", str(source), "--to", str(tmp_path / "there")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.filterwarnings("ignore:config.json. text_config. not applied")
@pytest.mark.parametrize("value", [None, 3, {"initializer_range": 0.1}])
def test_a_text_config_of_a_model_of_text_alone_is_not_read(value, source, tmp_path):
    with_field("text_config", value)(source)
    import_directory(source, tmp_path / "there")
    export_checkpoint(tmp_path / "there", tmp_path / "back")
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert described["initializer_range"] == 0.5 and described["text_config"] == value


def test_nothing_is_written_over_anything(source, tmp_path, capsys):
    there = tmp_path / "there"
    import_directory(source, there)
    before = sorted(there.rglob("*"))
    for command in (["import", str(source)], ["export", str(there)]):
        assert main([*command, "--to", str(there)]) == 2
        assert f"directory={str(there)!r}: must be absent or empty" in capsys.readouterr().err
    assert sorted(there.rglob("*")) == before
    command = ["export", str(source), "--to", str(tmp_path / "out"), "--family=llama"]
    assert main(command) == 2
    assert "config.json is not that of a run" in capsys.readouterr().err
    assert main(["import", str(source), "--to", str(tmp_path / "x"), "--param-dtype=f32"]) == 2
    assert "param_dtype='f32': must be one of float32" in capsys.readouterr().err


def test_a_write_that_breaks_off_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("No space left on device")

    import_directory(source, tmp_path / "there")
    monkeypatch.setattr(sys.modules[save.__module__], "save_file", full)
    assert main(["export", str(tmp_path / "there"), "--to", str(tmp_path / "back")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules[import_directory.__module__], "save_model", full)
    assert main(["import", str(source), "--to", str(tmp_path / "again")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there"]
