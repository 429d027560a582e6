"""``ablate serve``: OpenAI's client gets the tokens of transformers; bad options are one line."""

import contextlib
import signal
import subprocess
import sys
import threading

import jax
import openai
import pytest
import torch
import transformers
from flax import nnx

from layers.config import check
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from research.cli import main
from research.cli.options import load_language_model
from research.inference.engine import Speculative
from tests.conftest import environment
from tests.research.inference.server.test_openai import write_model

CHAT = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    write_model(folder)
    return folder


@contextlib.contextmanager
def serving(folder, *options):
    """The process of ``ablate serve``, and the address that it prints."""
    command = [sys.executable, "-m", "research.cli", "serve", str(folder), "--port=0", *options]
    process = subprocess.Popen(
        command, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    over = threading.Timer(300, process.kill)
    over.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:"), process.stderr.read()
        yield process, line.split()[1]
    finally:
        over.cancel()
        process.kill()
        process.communicate()


def test_the_tokens_are_those_of_transformers_and_sigterm_lets_answers_finish(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        out = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)
    want = out[0, prompt["input_ids"].shape[1] :].tolist()
    sizes = ("--slots=2", "--max-length=128", "--chunk=16")
    with serving(model, *sizes) as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [entry.id for entry in client.models.list()] == ["tiny-llama"]
        ask = dict(model="tiny-llama", messages=CHAT, temperature=0, max_tokens=24)
        answer = client.chat.completions.create(**ask, logprobs=True).choices[0]
        got = b"".join(bytes(entry.bytes) for entry in answer.logprobs.content)
        assert len(want) > 3 and got.decode(errors="replace") == tokenizer.decode(want)
        assert answer.message.content == tokenizer.decode(want, skip_special_tokens=True)

        ask = dict(model="tiny-llama", prompt="the", seed=1, max_tokens=100, stream=True)
        ask["logit_bias"] = {str(end): -100 for end in tokenizer.all_special_ids}
        stream = client.completions.create(**ask)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices and rest[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0
        error = process.stderr.read()
        assert error.splitlines() == [
            "ablate: compiling",
            "ablate: stopping; running requests are finished first (Ctrl-C again: stops at once)",
        ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port=70000"], "port=70000: must be in [0, 65535]"),
        (["--port=http"], "port='http': must be an integer"),
        (["--host=0.0.0.0"], "host='0.0.0.0': requires api-key-file"),
        (["--api-key-file=absent"], "api-key-file='absent': cannot be read"),
        (["--slots=0"], "slots=0: must be > 0"),
        (["--queue=0"], "queue=0: must be > 0"),
        (["--timeout=nan"], "timeout=nan: must be a finite number"),
        (["--timeout=0"], "timeout=0.0: must be > 0"),
        (["--chunk=24", "--page=16"], "cache.page=16: must divide chunk=24"),
        (["--page=0"], "page=0: must be > 0"),
        (["--pages=-1"], "pages=-1: must be > 0"),
        (["--kv-dtype=int7"], "dtype='int7': must be one of"),
        (["--max-length=100000000000"], "of state must fit into"),
        (["--draft=nowhere"], "draft='nowhere': is not a folder"),
        (["--ngram=5:2"], "ngram="),
        (["--ngram=1:2", "--engine=x"], "engine='x': does not support drafts"),
        (["--engine=nowhere"], "nowhere"),
        (["--api_key_file=x"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_compiled(
    model, monkeypatch, capsys, options, message
):
    monkeypatch.setattr("research.inference.engine.Engine.warm_up", None)
    assert main(["serve", str(model), "--port=0", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_draft_model_may_have_no_keys_to_store_in_pages(model, monkeypatch, capsys):
    recurrent = DecoderConfig(
        load_language_model(model).config.vocab_size, 8, 1, pattern=("mamba2",),
        mamba=MambaConfig(state=2, head_dim=8), mlp=MlpConfig(8), position="none",
    )  # fmt: skip
    draft = jax.jit(lambda: Decoder(recurrent, rngs=nnx.Rngs(0)))()

    def speculative(*_):
        return Speculative(draft=draft)

    def warm_up(engine):
        check(False, "warm_up", engine.config.cache.kind, "is reached")

    monkeypatch.setattr("research.cli.serve.load_speculative", speculative)
    monkeypatch.setattr("research.inference.engine.Engine.warm_up", warm_up)
    sizes = ("--slots=2", "--max-length=32", "--chunk=16")
    assert main(["serve", str(model), "--port=0", *sizes]) == 2
    assert "warm_up='paged': is reached" in capsys.readouterr().err


def test_a_missing_extra_is_named(model, monkeypatch, capsys):
    monkeypatch.setattr("research.cli.serve.find_spec", lambda name: name != "uvicorn" or None)
    assert main(["serve", str(model)]) == 2
    assert capsys.readouterr().err == (
        "ablate: `ablate serve` requires uvicorn: pip install -e '.[serve]'\n"
    )
