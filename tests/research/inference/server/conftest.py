"""A small Hugging Face directory: a tokenizer with special tokens, and a chat template."""

import json

import pytest
import tokenizers

from research.data import train_bpe
from research.inference.server import ServedTokenizer
from tests.research.inference.server.templates import CHATML

SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder, template=CHATML):
    """A tokenizer of 300 ids with its companions, as of a model of type llama."""
    folder.mkdir(parents=True, exist_ok=True)
    train_bpe(["the cat sat on the mat, naïve café"] * 9, 290, folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(SPECIAL[2:])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = dict(bos_token="<bos>", eos_token="<|im_end|>", chat_template=template)
    described |= dict(tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    ends = [tokenizer.token_to_id(name) for name in ("<eos>", "<|im_end|>")]
    described = dict(model_type="llama", eos_token_id=ends)
    (folder / "config.json").write_text(json.dumps(described))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = ServedTokenizer(folder)
    yield tokenizer
    tokenizer.template.close()
