"""Streamed text: the pieces are the whole, and no piece ends in half a character."""

from hypothesis import given
from hypothesis import strategies as st

from research.data import load_tokenizer, train_bpe
from research.inference import TextStream

BYTES = load_tokenizer("byte")


def pieces(tokenizer, tokens):
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in tokens] + [stream.flush()]


@given(st.text())
def test_text_arrives_a_character_at_a_time(text):
    parts = pieces(BYTES, BYTES.encode(text))
    assert "".join(parts) == text
    if "\ufffd" not in text:  # a real U+FFFD waits for what follows
        assert parts[-1] == "" and all(len(part) <= 1 for part in parts)


@given(st.lists(st.integers(0, 257)))
def test_any_bytes_arrive_as_they_decode(tokens):
    assert "".join(pieces(BYTES, tokens)) == BYTES.decode(tokens)


def test_a_cut_character_is_held_back_then_shown():
    stream = TextStream(BYTES)
    euro = BYTES.encode("€")
    assert [stream.push(token) for token in euro[:2]] == ["", ""]
    assert stream.flush() == "\ufffd" and stream.flush() == ""


def test_a_trained_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_bpe(["the cat sat on the mat, naïve café 東京"] * 5, 290, path)
    tokenizer = load_tokenizer(str(path))
    text = "the café on 東京 🙂, naïve"
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text
