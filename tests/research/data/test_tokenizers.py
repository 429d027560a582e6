"""Tokenizers: round trips, documents' ids, training, and what is refused."""

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from layers.config import ConfigError
from research.data import DataConfig, load_tokenizer, make_dataset, train_bpe, vocabulary_size

TEXTS = ["the cat sat on the mat, the dog sat on the log"] * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "new" / "tokenizer.json"
    assert train_bpe(TEXTS, 266, path) == 266
    return str(path)


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
    assert all(i < 256 for i in ids)
    np.testing.assert_array_equal(tokenizer.encode_documents([text.encode()])[0], ids)


def test_bytes_show_their_special_tokens():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257, 258], special_tokens=True) == "<bos>a<eos>"
    assert 257 not in tokenizer.encode("<eos>")
    with pytest.raises(ConfigError, match="special_tokens=True: bytes spell no special token"):
        tokenizer.encode("<eos>", special_tokens=True)


def test_bytes_have_no_other_special_tokens():
    assert load_tokenizer("byte", "<bos>", "<eos>").eos == 257
    for names in (("<s>", None), ("", None), (None, "</s>")):
        with pytest.raises(ConfigError, match=r"_token='.*': must be None or '<.os>': bytes have"):
            load_tokenizer("byte", *names)


def test_bytes_decode_a_cut_character():
    assert load_tokenizer("byte").decode("å".encode()[:1]) == "\ufffd"


@given(st.text(st.characters(codec="utf-8")))
@example("<eos>")
@example("a<bos> <eos>")
def test_bpe_round_trip(trained, text):
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
    np.testing.assert_array_equal(tokenizer.encode_documents([text.encode()])[0], ids)


def test_bpe_merges_and_is_the_same_each_time(trained, tmp_path):
    tokenizer = load_tokenizer(trained)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 1.5
    train_bpe(TEXTS, 266, tmp_path / "again.json")
    assert load_tokenizer(str(tmp_path / "again.json")).sha256 == tokenizer.sha256
    assert {tokenizer.bos, tokenizer.eos} == {0, 1}


def test_bpe_reaches_batches(trained, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"text": "the cat {i}"}}' for i in range(50)))
    config = DataConfig(
        source="files",
        paths=(str(path),),
        tokenizer=trained,
        batch_size=2,
        sequence_length=16,
        packing="first_fit",
    )
    tokenizer = load_tokenizer(trained)
    batch = next(iter(make_dataset(config)))
    segment = batch["segment_ids"][0] == 1
    assert batch["tokens"][0][segment][0] == tokenizer.bos
    assert batch["targets"][0][segment][-1] == tokenizer.eos
    assert tokenizer.decode(batch["tokens"][0][segment]).startswith("the cat ")
    assert vocabulary_size(config) == 266


def test_truncation_in_the_file_is_undone(trained, tmp_path):
    loaded = tokenizers.Tokenizer.from_file(trained)
    loaded.enable_truncation(3)
    loaded.enable_padding(length=99)
    loaded.save(str(tmp_path / "short.json"))
    assert len(load_tokenizer(str(tmp_path / "short.json")).encode(TEXTS[0])) not in (3, 99)


def test_other_programs_begin_a_text_as_a_document_begins(trained):
    own = tokenizers.Tokenizer.from_file(trained)
    assert own.encode("the cat").ids == [0, *load_tokenizer(trained).encode("the cat")]


def test_one_special_token_may_do_both(tmp_path):
    train_bpe(TEXTS, 270, tmp_path / "t.json", bos_token="<|end|>", eos_token="<|end|>")
    tokenizer = load_tokenizer(str(tmp_path / "t.json"), "<|end|>", "<|end|>")
    assert tokenizer.bos == tokenizer.eos


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=257: must be at least 258"):
        train_bpe(TEXTS, 257, tmp_path / "t.json")
