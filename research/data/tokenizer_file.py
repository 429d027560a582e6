"""A ``tokenizer.json`` through the `tokenizers` library, for text in which nothing is special."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from layers.config import ConfigError, check
from pallas_kernels.names import did_you_mean
from research.files import read_json

# files beside a tokenizer.json that name its special tokens; the first has precedence
NAMING = ("tokenizer_config.json", "special_tokens_map.json")
# a code point that Unicode reserves for such use: no text has it
_UNSPELLABLE = "\ufdd0"


class TokenizerFile:
    """Ids of text, and text of ids, by the ``tokenizer.json`` at ``path``.

    Text that spells a special token is ordinary text: it is encoded by other tokens. Special are
    the tokens that the file calls so, and those in ``special``.

    Attributes:
      vocab_size: the largest id + 1; there may be fewer tokens.
      sha256: of the file.
      special: the special tokens.

    Raises:
      ConfigError: the file cannot be read, or its ids are not those that it declares.
    """

    def __init__(self, path: str, special: Sequence[str] = ()):
        self.path = path
        content, self._tokenizer = _read(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        # truncation or padding saved in the file would silently change documents
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        added = {t.content: t.special for t in self._added()}
        self._tokenizer.add_special_tokens(
            [name for name in special if name in vocabulary and not added.get(name)]
        )
        self.special = tuple(t.content for t in self._added() if t.special)
        self._text_tokenizer = _for_text(self._tokenizer)

    def token_id(self, field: str, token: str) -> int:
        """The id of ``token``; an error names ``field`` and suggests a similar token."""
        identifier = self._tokenizer.token_to_id(token)
        if identifier is None:
            names = [t.content for t in self._added()] or list(self._tokenizer.get_vocab())
            near = did_you_mean(token, names) or f"e.g. one of {names[:8]}"
            raise ConfigError(f"{field}={token!r}: must be a token of {self.path!r}; {near}")
        return identifier

    def token(self, identifier: int) -> str | None:
        """The token with this id, or None."""
        return self._tokenizer.id_to_token(identifier)

    def beginning(self, text: str) -> list[int]:
        """The special tokens with which the file's own template begins ``text``."""
        encoding = self._tokenizer.encode(text or "a")
        mask = [*encoding.special_tokens_mask, 0]
        return encoding.ids[: mask.index(0)]

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Ids of ``text``; if ``special_tokens``, the text of a special token is that token."""
        tokenizer = self._tokenizer if special_tokens else self._text_tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each UTF-8 document, in the smallest unsigned dtype, without special tokens."""
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        encoded = []
        for start in range(0, len(documents), 256):  # an Encoding is large: keep few in memory
            texts = [d.decode() for d in documents[start : start + 256]]
            try:
                batch = self._text_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            except Exception as error:  # e.g. an unknown word and no token for it
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"tokenizer={self.path!r}: cannot encode the documents ({reason})"
                ) from None
            encoded += [np.array(e.ids, dtype) for e in batch]
        return encoded

    def decode(self, ids: Iterable[int], special_tokens: bool = False) -> str:
        """The text of ``ids``; special tokens are shown if ``special_tokens``, or left out."""
        return self._tokenizer.decode([int(i) for i in ids], not special_tokens)

    def to_json(self) -> str:
        """The content of a ``tokenizer.json`` with these tokens."""
        return self._tokenizer.to_str()

    def _added(self) -> list[tokenizers.AddedToken]:
        return list(self._tokenizer.get_added_tokens_decoder().values())


def special_names(path: str) -> dict[str, str]:
    """``bos_token`` and ``eos_token`` as the files beside the tokenizer.json at ``path`` name them.

    A name that no file gives is absent. If there are no such files, the names are those of
    `research.data.train_bpe`, ``<bos>`` and ``<eos>``.

    Raises:
      ConfigError: a file is damaged; names it.
    """
    files = [file for name in NAMING if (file := Path(path).parent / name).is_file()]
    if not files:
        return {"bos_token": "<bos>", "eos_token": "<eos>"}
    named = {}
    for file in reversed(files):
        content = read_json(file)
        check(isinstance(content, dict), "file", str(file), "must hold an object")
        for field in ("bos_token", "eos_token"):
            value = named_token(content, field)
            if value is not None:
                check(isinstance(value, str), field, value, f"must be text in {str(file)!r}")
                named[field] = value
    return named


def named_token(content: Mapping[str, Any], field: str) -> Any:
    """The name in ``field`` of one of `NAMING`, which is text or an object with ``content``."""
    value = content.get(field)
    return value.get("content") if isinstance(value, dict) else value


def _read(path: str) -> tuple[bytes, tokenizers.Tokenizer]:
    """The bytes of the file, and its tokenizer."""
    try:
        content = Path(path).read_bytes()
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        problem = _problem(tokenizer, json.loads(content))
    except BaseException as error:  # the library raises bare Exception, or panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        problem = " ".join(str(error).split())[:200]  # it may quote the file
    if problem:
        raise ConfigError(
            f"tokenizer={path!r}: must be 'byte' or a readable tokenizer.json ({problem})"
        )
    return content, tokenizer


def _problem(tokenizer: tokenizers.Tokenizer, description: Mapping[str, Any]) -> str | None:
    """Why the ids of ``tokenizer`` cannot be used, or None."""
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    if not pieces:
        return "its vocabulary is empty"
    if len(pieces) < tokenizer.get_vocab_size(with_added_tokens=False):
        return "its vocabulary has a token twice"
    tokens: dict[int, str] = {}
    for token, identifier in tokenizer.get_vocab().items():
        if identifier in tokens:
            return f"{tokens[identifier]!r} and {token!r} have the id {identifier}"
        tokens[identifier] = token
    # the library lists all numbers below it that are no ids
    if max(tokens) >= 2**24:
        return f"the id {max(tokens)} is too large"
    # the library numbers added tokens itself
    for added in description.get("added_tokens") or ():
        token, declared = added["content"], added["id"]
        if tokenizer.token_to_id(token) != declared:
            actual = tokenizer.token_to_id(token)
            return f"{token!r} is declared with the id {declared}, but has the id {actual}"
    return None


def _for_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that does not find special tokens in text.

    `encode_special_tokens` leaves added tokens out of the search. But the model may have a piece of
    the same name, which e.g. a unigram model would use: these get names that no text spells.
    """
    description = json.loads(tokenizer.to_str())
    model, special = description["model"], set()
    for added in description["added_tokens"]:
        if added["special"]:
            special.add(added["content"])
            added["content"] = _renamed(added["content"])

    def rename(token: str) -> str:
        return _renamed(token) if token in special else token

    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[rename(token), *score] for token, *score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = rename(model["unk_token"])
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not special & {left, right, left + right.removeprefix(prefix)}
        ]
    description["post_processor"] = None  # it would only add special tokens
    copy = tokenizers.Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = True
    return copy


def _renamed(token: str) -> str:
    return _UNSPELLABLE + token
