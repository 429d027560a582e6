"""``ablate generate``: what a checkpoint says, and one line where it cannot."""

import json
import shutil

import pytest
import tokenizers
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.cli import main
from research.convert import import_directory
from research.data import DataConfig, load_tokenizer, train_bpe
from research.inference import SamplingConfig, generate, load_prompt_tokenizer
from research.models import save
from research.models.companions import ORIGIN
from research.training import TrainingConfig, load_model, save_model, train

SMALL = DecoderConfig(300, 8, 1, attention=AttentionConfig(2), mlp=MlpConfig(12), scan=False)
TEXT = ["the cat sat on the mat", "naïve café"] * 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two arms, the second with another tokenizer and an end that comes soon."""
    folder = tmp_path_factory.mktemp("run")
    data = DataConfig(sequence_length=16, batch_size=2)
    training = TrainingConfig(steps=1, eval_batches=0)
    train(SMALL, data, training, workdir=folder / "bytes/seed0")
    shutil.copytree(folder / "bytes/seed0", folder / "words/seed0")
    train_bpe(TEXT, 280, folder / "tokenizer.json")
    changed = json.loads((folder / "words/seed0/config.json").read_text())
    changed["data"] |= dict(tokenizer=str(folder / "tokenizer.json"))
    (folder / "words/seed0/config.json").write_text(json.dumps(changed))
    return folder


@pytest.fixture(scope="module")
def imported(run, tmp_path_factory):
    """A checkpoint imported with its tokenizer, which begins every text with <bos>."""
    folder = tmp_path_factory.mktemp("imported")
    save(Decoder(SMALL, rngs=nnx.Rngs(0)), folder / "theirs", "llama")
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    begin = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begin)]
    )
    tokenizer.save(str(folder / "theirs/tokenizer.json"))
    described = json.loads((folder / "theirs/config.json").read_text())
    (folder / "theirs/config.json").write_text(json.dumps(described | dict(eos_token_id=[5, 6])))
    import_directory(folder / "theirs", folder / "ours")
    return folder / "ours"


def test_a_units_text_is_that_of_generate(run, capsys):
    folder = run / "bytes/seed0"
    assert main(["generate", str(folder), "--prompt=é", "--max-tokens=9", "--seed=3"]) == 0
    tokenizer = load_tokenizer("byte")
    sampling = SamplingConfig(9, stop_tokens=(tokenizer.eos,), seed=3)
    new = generate(load_model(folder), [[tokenizer.bos, *tokenizer.encode("é")]], sampling)[0]
    assert capsys.readouterr().out == "é" + tokenizer.decode(new) + "\n"


@pytest.mark.parametrize("drafter", ["--draft", "--ngram=1:3"])
def test_drafts_change_no_greedy_text(run, capsys, drafter):
    folder = run / "bytes/seed0"
    options = ["generate", str(folder), "--prompt=ab", "--max-tokens=12", "--temperature=0"]
    assert main(options) == 0
    text = capsys.readouterr().out
    drafter = f"--draft={folder}" if drafter == "--draft" else drafter
    assert main([*options, drafter]) == 0
    assert capsys.readouterr().out == text
    assert main([*options, drafter, f"--stop={text[6:8]}", "--top-k=2", "--top-p=0.5"]) == 0
    assert capsys.readouterr().out == text[: text.index(text[6:8], 2)] + "\n"


def test_an_imported_checkpoint_speaks_with_its_own_tokenizer(imported, capsys):
    tokenizer = load_prompt_tokenizer(imported)
    own = tokenizers.Tokenizer.from_file(str(imported / ORIGIN / "tokenizer.json"))
    assert tokenizer.encode("the cat") == own.encode("the cat").ids
    assert tokenizer.encode("")[0] == own.token_to_id("<bos>")
    assert tokenizer.stop_tokens == (5, 6)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert main(["generate", str(imported), "--prompt=the", "--max-tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("the")
    (imported / ORIGIN / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_prompt_tokenizer(imported).stop_tokens == (7,)
    for content, message in (('{"eos_token_id": "two"}', "must be ids in"), ("[]", "an object")):
        (imported / ORIGIN / "generation_config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_prompt_tokenizer(imported)
    (imported / ORIGIN / "generation_config.json").unlink()


def test_a_hugging_face_directory_is_read_as_it_is(imported, capsys):
    asked = ["--prompt=the", "--max-tokens=6", "--temperature=0"]
    assert main(["generate", str(imported), *asked]) == 0
    want = capsys.readouterr().out
    assert main(["generate", str(imported.parent / "theirs"), *asked]) == 0
    assert capsys.readouterr().out == want


def test_several_models_are_named_and_one_is_taken(run, capsys):
    assert main(["generate", str(run)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"ablate: run={str(run)!r}: holds several models; add one of bytes/seed0, words/seed0\n"
    )
    assert main(["generate", str(run / "words"), "--prompt=the", "--max-tokens=2"]) == 0
    assert capsys.readouterr().err == f"ablate: {run / 'words/seed0'}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-tokens=few"], "max-tokens='few': must be an integer"),
        (["--max-tokens=0"], "max-tokens=0: must be > 0"),
        (["--max-tokens=10000000000000"], "GB of state must fit into"),
        (["--temperature=hot"], "temperature='hot': must be a number"),
        (["--temperature=nan"], "temperature=nan: must be a finite number"),
        (["--seed=-1"], "seed=-1: must be in [0, 2**32)"),
        (["--top-k=0"], "top_k=0: must be > 0 or None"),
        (["--top-p=much"], "top-p='much': must be a number"),
        (["--stop="], "--stop=: must not be empty"),
        (["--ngram=3"], "ngram='3': must be A:B, numbers of tokens with 1 ≤ A ≤ B"),
        (["--ngram=3:2"], "ngram='3:2': must be A:B"),
        (["--ngram=1:2", "--draft=x"], "ngram='1:2': cannot be given with draft"),
        (["--draft=nowhere"], "draft='nowhere': is not a folder"),
        (["--prompt=\udcff"], "prompt='\\udcff': cannot be encoded"),
    ],
)
def test_values_that_cannot_be_are_one_line(run, capsys, arguments, message):
    assert main(["generate", str(run / "bytes/seed0"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_folders_without_a_model_or_a_tokenizer_are_one_line(run, tmp_path, capsys):
    def refused(folder, *arguments) -> str:
        assert main(["generate", str(folder), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "is not a folder" in refused(tmp_path / "nowhere")
    assert "holds no trained model" in refused(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copyfile(run / "bytes/seed0/config.json", begun / "config.json")
    assert "holds no checkpoint" in refused(begun)
    save_model(Decoder(SMALL, rngs=nnx.Rngs(0)), tmp_path / "alone")
    assert "must hold hugging_face/tokenizer.json" in refused(tmp_path / "alone")
    changed = json.loads((begun / "config.json").read_text())
    changed["data"] |= dict(source="synthetic")
    (begun / "config.json").write_text(json.dumps(changed))
    assert "data.source='synthetic': generation requires text" in refused(begun)
    changed["data"] |= dict(source="stdlib", tokenizer="gone.json")
    (begun / "config.json").write_text(json.dumps(changed))
    assert "tokenizer='gone.json': must be" in refused(begun)


def test_a_prompt_without_a_token_is_one_line(imported, capsys, tmp_path):
    shutil.copytree(imported, tmp_path / "ours")
    path = tmp_path / "ours" / ORIGIN / "tokenizer.json"
    changed = json.loads(path.read_text()) | dict(post_processor=None)
    path.write_text(json.dumps(changed))
    assert main(["generate", str(tmp_path / "ours")]) == 2
    assert "prompt='': must give at least one token" in capsys.readouterr().err
    path.write_text("{}")
    assert main(["generate", str(tmp_path / "ours"), "--prompt=a"]) == 2
    assert "tokenizer.json': must be 'byte' or a readable" in capsys.readouterr().err


def test_a_model_of_rewards_is_refused(run, capsys, tmp_path):
    reward = DecoderConfig(
        300, 8, 1, attention=AttentionConfig(2), mlp=MlpConfig(12), tie_embeddings=False, outputs=1
    )
    save_model(Decoder(reward, rngs=nnx.Rngs(0)), tmp_path / "reward")
    shutil.copytree(run, tmp_path / "reward" / ORIGIN)
    assert main(["generate", str(tmp_path / "reward"), "--prompt=a"]) == 2
    assert "model.outputs=1: generation requires a language model" in capsys.readouterr().err
