"""Tokenizers and special tokens from import through training to export, read by transformers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.cli import main
from research.convert import export_checkpoint, import_directory
from research.data import DataConfig, load_tokenizer, train_bpe
from research.inference import load_prompt_tokenizer
from research.models.companions import ORIGIN, write_companions
from research.training import TrainingConfig, load_model, loop, train
from tests.research.models.conftest import LLAMA, logits_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = DecoderConfig(
    300, 8, 1, attention=AttentionConfig(2), mlp=MlpConfig(12), tie_embeddings=False
)
TEXT = "the cat sat on the mat"
TRAINING = TrainingConfig(steps=1, eval_batches=0)


def data_of(tmp_path, **fields) -> DataConfig:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5)
    return DataConfig(
        source="files", paths=(str(path),), validation_fraction=0.0, sequence_length=8,
        batch_size=1, **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Qwen 3 as transformers saves it: no beginning, two ends, more logits than tokens."""
    folder = tmp_path_factory.mktemp("theirs")
    train_bpe([TEXT], 265, folder / "own.json", "<|endoftext|>", "<|im_end|>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "own.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder / "model")
    ids = dict(eos_token_id=[1, 0], pad_token_id=0, bos_token_id=0)
    fields = dict(LLAMA, vocab_size=270, head_dim=6, initializer_range=0.5)
    config = transformers.Qwen3Config(**fields | dict(bos_token_id=0, eos_token_id=1))
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**ids, top_k=7, do_sample=True)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "model"
    assert main(["import", str(theirs), "--to", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(imported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    start = load_model(imported)
    data = data_of(folder, tokenizer=str(imported / ORIGIN / "tokenizer.json"))
    train(start.config, data, TRAINING, init=lambda fresh: start, workdir=folder / "model")
    return folder / "model"


def read(path: Path):
    return json.loads(path.read_text())


def loaded_by_transformers(folder, model):
    """Their tokenizer and model of ``folder``, after a comparison of logits with ``model``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = np.asarray([tokenizer(TEXT)["input_ids"][:8]])
    ours = jax.jit(model)(tokens).logits_btv
    np.testing.assert_allclose(ours, logits_of(theirs, tokens), atol=2e-5, rtol=2e-5)
    return tokenizer, theirs


def test_a_fine_tuned_model_keeps_what_was_imported(theirs, imported, tuned, tmp_path, capsys):
    assert main(["export", str(tuned), "--to", str(tmp_path / "x")]) == 0
    tokenizer, model = loaded_by_transformers(tmp_path / "x", load_model(tuned))
    original = transformers.AutoTokenizer.from_pretrained(theirs)
    assert tokenizer(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 1, 0)
    assert tokenizer.chat_template == original.chat_template
    assert isinstance(model, transformers.Qwen3ForCausalLM)
    assert model.generation_config.eos_token_id == [1, 0] and model.generation_config.top_k == 7
    before, after = read(theirs / "config.json"), read(tmp_path / "x/config.json")
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"):
        assert after[field] == before[field], field
    assert not np.array_equal(
        *(jax.tree.leaves(load_model(folder))[0] for folder in (imported, tuned))
    )
    assert main(["generate", str(tuned), "--prompt=the cat", "--max-tokens=2"]) == 0
    assert capsys.readouterr().out.partition("\n")[2].startswith("the cat")


def test_another_family_keeps_the_tokenizer_and_the_ids(tuned, tmp_path):
    with pytest.raises(ConfigError, match="a LlamaForCausalLM would have"):
        export_checkpoint(tuned, tmp_path / "x", family="llama")
    mistral = dict(LLAMA, vocab_size=270, sliding_window=None, bos_token_id=0, eos_token_id=1)
    config = transformers.MistralConfig(**mistral)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    train_bpe([TEXT], 265, tmp_path / "mistral/tokenizer.json")
    import_directory(tmp_path / "mistral", tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "x", family="llama")
    described = read(tmp_path / "x/config.json")
    assert described["architectures"] == ["LlamaForCausalLM"] and "sliding_window" not in described
    assert (described["bos_token_id"], described["eos_token_id"]) == (0, 1)
    assert (tmp_path / "x/tokenizer.json").is_file()


def test_configured_tokens_are_those_of_the_export(theirs, tuned, tmp_path):
    tokenizer = str(theirs / "tokenizer.json")
    data = data_of(tmp_path, tokenizer=tokenizer, bos_token="<|im_end|>", eos_token="<|endoftext|>")
    write_companions(data, tmp_path / ORIGIN)
    config, named, generation = (
        read(tmp_path / ORIGIN / f"{name}.json")
        for name in ("config", "tokenizer_config", "generation_config")
    )
    assert (named["bos_token"], named["eos_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    # 0 is one of the two tokens that ended a text before
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [1, 0])
    assert read(theirs / "config.json")["eos_token_id"] == 1, "the source is as it was"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_model_from_scratch_goes_with_its_tokenizer(kind, tmp_path):
    name = "byte"
    if kind == "bpe":
        name = str(tmp_path / "own" / "words.json")
        train_bpe([TEXT], 280, name)
        (tmp_path / "own/config.json").write_text('{"model": {}}')  # of a run, not of a model
    data = data_of(tmp_path, tokenizer=name)
    train(SMALL, data, TRAINING, workdir=tmp_path / "run")
    with pytest.raises(ConfigError, match="family=None: not an imported model"):
        export_checkpoint(tmp_path / "run", tmp_path / "x")
    export_checkpoint(tmp_path / "run", tmp_path / "x", family="llama")
    tokenizer, model = loaded_by_transformers(tmp_path / "x", load_model(tmp_path / "run"))
    ours = load_tokenizer(name)
    for text in (TEXT, "naïve café\n 語", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == [ours.bos, *ours.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos, ours.eos)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (ours.bos, ours.eos)
    assert model.generation_config.eos_token_id == ours.eos


def test_generation_reads_the_tokenizer_as_it_was_when_the_run_began(tmp_path):
    path = tmp_path / "own/tokenizer.json"
    train_bpe([TEXT], 280, path)
    train(SMALL, data_of(tmp_path, tokenizer=str(path)), TRAINING, workdir=tmp_path / "run")
    expected = [0, *load_tokenizer(str(path)).encode(TEXT)]
    path.unlink()
    tokenizer = load_prompt_tokenizer(tmp_path / "run")
    assert tokenizer.encode(TEXT) == expected and tokenizer.stop_tokens == (1,)


def test_prompts_spell_special_tokens_only_on_request(imported, tuned):
    for folder in (imported, tuned):
        text = load_prompt_tokenizer(folder)
        assert not {0, 1} & set(text.encode("<|im_end|>")[1:])
        assert text.decode([*text.encode("<|im_end|>"), 1]).endswith("<|im_end|>")
        special = load_prompt_tokenizer(folder, special_tokens=True)
        assert special.encode("<|im_end|>")[-1] == 1
        assert special.decode([1]) == "<|im_end|>" and text.decode([1]) == ""


def test_a_start_that_is_named_gives_the_family_with_any_tokenizer(imported, tmp_path):
    config = load_model(imported).config
    train(config, data_of(tmp_path), TRAINING, init=imported, workdir=tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "x")
    tokenizer, model = loaded_by_transformers(tmp_path / "x", load_model(tmp_path / "run"))
    assert tokenizer("é")["input_ids"] == [256, *"é".encode()]
    assert isinstance(model, transformers.Qwen3ForCausalLM)
    ids = [getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert ids == [256, 257, None]


def test_a_run_without_text_has_the_companions_of_its_start(imported, tmp_path):
    task = DataConfig(source="synthetic", sequence_length=8, batch_size=1)
    for number, data in enumerate((None, task)):
        write_companions(data, tmp_path / f"{number}", imported / ORIGIN)
        names = sorted(path.name for path in (imported / ORIGIN).iterdir())
        assert sorted(path.name for path in (tmp_path / f"{number}").iterdir()) == names
    write_companions(task, tmp_path / "none", tmp_path / "absent")
    assert not (tmp_path / "none").exists()


def test_a_start_is_loaded_and_not_the_fresh_model(imported, tmp_path):
    start = load_model(imported)
    data = data_of(tmp_path)
    options: dict = dict(progress=lambda *_: None)
    by_path, by_function = (
        train(start.config, data, TRAINING, init=init, **options).model
        for init in (str(imported), lambda fresh: start)
    )
    for one, other in zip(*map(jax.tree.leaves, (by_path, by_function)), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match="holds no config.json of a run"):
        train(start.config, data, TRAINING, init=tmp_path / "absent", **options)


def test_a_start_does_not_take_the_memory_of_two_models(imported, tmp_path, monkeypatch):
    loop._begin.cache_clear()
    monkeypatch.setattr(loop, "build", lambda *_: pytest.fail("initialises a second model"))
    config = load_model(imported).config
    train(config, data_of(tmp_path), TRAINING, init=imported, progress=lambda *_: None)


def test_a_start_is_loaded_onto_the_devices_of_the_run(tmp_path, run_script):
    script = """
import sys
import jax
from tests.research.test_memory import DATA, MODEL, TRAINING
from research.training import train

first, second = jax.devices()
train(MODEL, DATA, TRAINING, workdir=sys.argv[1], devices=[first], progress=lambda *_: None)
tuned = train(MODEL, DATA, TRAINING, init=sys.argv[1], devices=[second], progress=lambda *_: None)
print({device.id for leaf in jax.tree.leaves(tuned.model) for device in leaf.devices()})
"""
    assert run_script(script, tmp_path / "start", devices=2) == "{1}\n"
