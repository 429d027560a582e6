"""Tokenizers: bytes by default, any ``tokenizer.json``, and the training of a new one."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from layers.config import ConfigError, check


class Tokenizer(Protocol):
    """The interface of a tokenizer; every document becomes ``bos ids eos``."""

    vocab_size: int
    bos: int
    eos: int
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens."""
        ...

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each UTF-8 document, in the smallest unsigned dtype, without special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens are left out."""
        ...


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 begins a document, 257 ends it. Requires no file and is lossless."""

    vocab_size = 258
    bos = 256
    eos = 257
    sha256 = hashlib.sha256(b"byte 256 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(d, np.uint8) for d in documents]

    def decode(self, ids: Iterable[int]) -> str:
        # generation may stop inside a character: show it, do not raise
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class JsonTokenizer:
    """A ``tokenizer.json`` through the `tokenizers` library."""

    def __init__(self, path: str, bos_token: str, eos_token: str):
        try:
            content = Path(path).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception for a bad file
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"tokenizer={path!r}: must be 'byte' or a readable tokenizer.json ({reason})"
            ) from None
        # truncation or padding saved in the file would silently change documents
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.bos = self._special("bos_token", bos_token)
        self.eos = self._special("eos_token", eos_token)
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def _special(self, field: str, token: str) -> int:
        identifier = self._tokenizer.token_to_id(token)
        added = [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]
        if identifier is None:
            allowed = f"must be a token of the tokenizer, e.g. one of {added[:8]}"
            raise ConfigError(f"{field}={token!r}: {allowed}")
        return identifier

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        encoded = []
        for start in range(0, len(documents), 256):  # an Encoding is large: keep few in memory
            texts = [d.decode() for d in documents[start : start + 256]]
            batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encoded += [np.array(e.ids, self._dtype) for e in batch]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(
    name: str, bos_token: str = "<bos>", eos_token: str = "<eos>"
) -> ByteTokenizer | JsonTokenizer:
    """``byte``, or the tokenizer in the ``tokenizer.json`` at path ``name``.

    Raises:
      ConfigError: the file cannot be read or parsed, or lacks ``bos_token`` or ``eos_token``.
    """
    if name == "byte":
        return ByteTokenizer()
    return _load_json(name, bos_token, eos_token, _modified(name))


@functools.lru_cache(maxsize=4)
def _load_json(path: str, bos: str, eos: str, modified: int) -> JsonTokenizer:
    del modified  # part of the cache's key: a rewritten file is read again
    return JsonTokenizer(path, bos, eos)


def _modified(path: str) -> int:
    return Path(path).stat().st_mtime_ns if Path(path).exists() else 0


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    path: str | Path,
    bos_token: str = "<bos>",
    eos_token: str = "<eos>",
) -> int:
    """Train a byte-level BPE on ``texts`` and save it as ``path`` (a ``tokenizer.json``).

    Returns:
      The vocabulary's size: ``vocab_size``, or less if the texts have too few merges.

    Raises:
      ConfigError: ``vocab_size`` cannot hold all bytes and the two special tokens.
    """
    specials = list(dict.fromkeys([bos_token, eos_token]))
    minimum = 256 + len(specials)
    check(
        vocab_size >= minimum,
        "vocab_size",
        vocab_size,
        f"must be at least {minimum}: 256 bytes and the special tokens",
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()
