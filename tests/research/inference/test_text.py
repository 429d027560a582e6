"""Streamed text: the pieces are the whole up to a stop string; none ends in half a character."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from layers.config import ConfigError
from research.data import load_tokenizer, train_bpe
from research.inference import TextStream

BYTES = load_tokenizer("byte")


class Pieces:
    """A tokenizer that decodes token i to the i-th of some texts."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)


def pieces(tokenizer, tokens):
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in tokens] + [stream.flush()]


def first_stop(text, stops):
    """(what is before it, it): the stop string that is complete in the shortest beginning."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


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


def test_only_the_incomplete_character_of_a_token_is_held_back():
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE({"abâ": 0, "Ĥ": 1, "¬": 2}, []))
    tokens.decoder = tokenizers.decoders.ByteLevel()
    stream = TextStream(tokens)
    assert [stream.push(token) for token in (0, 1, 2)] == ["ab", "", "€"]
    assert stream.flush() == ""


@pytest.mark.parametrize("token", [0xFF, BYTES.bos], ids=["no character", "no text"])
def test_tokens_that_never_complete_a_character_cost_no_more_each(token):
    lengths = []

    class Counting:
        def decode(self, ids):
            lengths.append(len(ids))
            return BYTES.decode(ids)

    parts = pieces(Counting(), [token] * 1000)
    assert "".join(parts) == BYTES.decode([token] * 1000) and max(lengths) < 200


def test_a_trained_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_bpe(["the cat sat on the mat, naïve café 東京"] * 5, 290, path)
    tokenizer = load_tokenizer(str(path))
    text = "the café on 東京 🙂, naïve"
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text


LETTERS = st.text("ab€", max_size=6)


@given(
    texts=st.lists(LETTERS, max_size=12),
    stops=st.lists(LETTERS.filter(bool), max_size=3),
    count=st.integers(0, 12),
)
def test_a_stop_string_is_met_where_the_whole_text_has_it(texts, stops, count):
    """Whatever the tokens: they hold several characters, parts of a stop string, or two of them."""
    stream, shown = TextStream(Pieces(texts), stops), ""
    for token in range(len(texts)):
        shown += stream.push(token)
        text = "".join(texts[: token + 1])
        before, stop = first_stop(text, stops)
        assert stream.stopped == stop  # at once
        # all is shown but what may become a stop string
        possible = [n for n in range(len(text)) if any(s.startswith(text[n:]) for s in stops)]
        assert shown == (before if stop else text[: min(possible, default=len(text))])
        if len(stops) == 1:
            assert stop is None or before == text[: text.find(stops[0])]
    shown += stream.flush()
    assert (shown, stream.stopped) == first_stop("".join(texts), stops)
    assert stream.push(0) == "" if stream.stopped and texts else True


@given(text=st.text("ab€\n"), stop=st.text("ab€\n", min_size=1, max_size=4))
def test_a_stop_string_across_bytes(text, stop):
    stream = TextStream(BYTES, [stop])
    shown = "".join(stream.push(token) for token in BYTES.encode(text)) + stream.flush()
    assert shown == (text[: text.find(stop)] if stop in text else text)
    assert stream.stopped == (stop if stop in text else None)


def test_a_stop_string_across_merged_tokens_of_a_tokenizer_that_drops_spaces():
    """Metaspace decoding drops the first space; a stop string starts and ends inside tokens."""
    words = {"▁one": 0, "▁two": 1, "▁three": 2, "th": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "th"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    stream = TextStream(tokenizer, ["wo th", "nothing"])
    assert [stream.push(token) for token in (0, 1, 2, 0)] == ["one", " t", "", ""]
    assert stream.stopped == "wo th" and stream.flush() == ""


@pytest.mark.parametrize("stop", ["", 3, None])
def test_a_stop_string_has_at_least_one_character(stop):
    with pytest.raises(ConfigError) as raised:
        TextStream(BYTES, ["a", stop])
    assert str(raised.value) == f"stop[1]={stop!r}: must be a text, not ''"
