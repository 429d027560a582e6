"""Tokenizers: bytes by default, any ``tokenizer.json``, and the training of a new one."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from layers.config import check
from research.data.tokenizer_file import NAMING, TokenizerFile, special_names


class Tokenizer(Protocol):
    """The interface of a tokenizer; every document becomes ``bos ids eos``.

    ``bos`` is None if documents begin with their text. ``vocab_size`` is the largest id + 1.
    ``special``: the texts that are tokens of their own for ``encode`` with ``special_tokens``.
    """

    vocab_size: int
    bos: int | None
    eos: int
    sha256: str
    special: Sequence[str]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Ids of ``text``, without ``bos`` and ``eos``.

        Text that spells a special token is ordinary text, or that token if ``special_tokens``.
        """
        ...

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each UTF-8 document, in the smallest unsigned dtype, without special tokens."""
        ...

    def decode(self, ids: Iterable[int], special_tokens: bool = False) -> str:
        """The text of ``ids``; special tokens are shown if ``special_tokens``, or left out."""
        ...

    def to_json(self) -> str:
        """The content of a ``tokenizer.json`` with these ids."""
        ...


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 begins a document, 257 ends it. Requires no file and is lossless.

    ``names`` are shown for the special tokens; no text is encoded by these.
    """

    vocab_size = 258
    names = ("<bos>", "<eos>")
    special: Sequence[str] = ()
    bos: int | None = 256
    eos = 257
    stop_tokens = (eos,)
    sha256 = hashlib.sha256(b"byte 256 257").hexdigest()

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        check(not special_tokens, "special_tokens", True, "bytes spell no special token")
        return list(text.encode())

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(d, np.uint8) for d in documents]

    def decode(self, ids: Iterable[int], special_tokens: bool = False) -> str:
        shown = dict(zip((self.bos, self.eos), self.names, strict=True)) if special_tokens else {}
        pieces = (bytes([i]) if i < 256 else shown.get(i, "").encode() for i in map(int, ids))
        # generation may stop inside a character: show it, do not raise
        return b"".join(pieces).decode(errors="replace")

    def to_json(self) -> str:
        """A ``tokenizer.json`` with the same ids, for other programs."""
        alphabet = {letter: byte for byte, letter in enumerate(byte_letters())}
        model = tokenizers.models.BPE(alphabet, [])
        tokenizer = _byte_level(model, use_regex=False)
        tokenizer.add_special_tokens(list(self.names))
        _begin_with(tokenizer, self.names[0])
        return tokenizer.to_str(pretty=True)


def byte_letters() -> list[str]:
    """The letter for each byte in GPT-2's vocabulary, which the library calls ``ByteLevel``."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class JsonTokenizer(TokenizerFile):
    """A ``tokenizer.json``, and the tokens of it that begin and end a document.

    ``sha256`` is that of the file and these two tokens.
    """

    def __init__(self, path: str, bos_token: str | None, eos_token: str | None):
        named = special_names(path)
        bos = named.get("bos_token") if bos_token is None else bos_token
        eos = named.get("eos_token") if eos_token is None else eos_token
        super().__init__(path, [name for name in (bos, eos) if name])
        required = f"{path!r} requires a token that ends a document"
        check(bool(eos), "eos_token", eos_token, required)
        self.bos = self.token_id("bos_token", bos) if bos else None
        self.eos = self.token_id("eos_token", str(eos))
        self.stop_tokens = (self.eos,)
        self.sha256 = hashlib.sha256(f"{self.sha256} {self.bos} {self.eos}".encode()).hexdigest()


def load_tokenizer(
    name: str, bos_token: str | None = None, eos_token: str | None = None
) -> ByteTokenizer | JsonTokenizer:
    """``byte``, or the tokenizer in the ``tokenizer.json`` at path ``name``.

    Args:
      bos_token, eos_token: see `DataConfig`.

    Raises:
      ConfigError: the file cannot be read or parsed, or lacks ``bos_token`` or ``eos_token``.
    """
    if name == "byte":
        for field, token, own in zip(
            ("bos_token", "eos_token"), (bos_token, eos_token), ByteTokenizer.names, strict=True
        ):
            check(
                token in (None, own), field, token, f"must be None or {own!r}: bytes have no other"
            )
        return ByteTokenizer()
    files = (Path(name), *(Path(name).parent / file for file in NAMING))
    return _load_json(name, bos_token, eos_token, tuple(map(_modified, files)))


@functools.lru_cache(maxsize=4)
def _load_json(
    path: str, bos: str | None, eos: str | None, modified: tuple[int, ...]
) -> JsonTokenizer:
    del modified  # part of the cache's key: a rewritten file is read again
    return JsonTokenizer(path, bos, eos)


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


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
    tokenizer = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    _begin_with(tokenizer, bos_token)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def _byte_level(model: tokenizers.models.BPE, use_regex: bool = True) -> tokenizers.Tokenizer:
    """Merges of bytes; with ``use_regex`` inside the words of GPT-2's pattern."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=use_regex)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _begin_with(tokenizer: tokenizers.Tokenizer, bos: str) -> None:
    """Let other programs begin a text with ``bos``; `Tokenizer.encode` does not read this."""
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
