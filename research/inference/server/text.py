"""The tokenizer as the server uses it: prompts, chats, and the text of single tokens."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layers.config import ConfigError, check
from research.data.tokenizers import ByteTokenizer, byte_letters
from research.inference.prompt import PromptTokenizer, load_prompt_tokenizer
from research.inference.server.chat import ChatTemplate, load_template

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}
_DAMAGED = "\N{REPLACEMENT CHARACTER}"


class TokenText(NamedTuple):
    """The ``text`` of one token inside a text, its ``raw`` bytes, and what an answer shows of it.

    The bytes may be part of a character; then the text has U+FFFD. Special tokens are not shown.
    """

    text: str
    raw: bytes
    shown: str


class ServedTokenizer:
    """The tokenizer and chat template in ``folder``: of a run, a checkpoint, or Hugging Face's.

    An answer ends at ``stop_tokens``: those of the configuration, and the ``eos_token``.
    ``plain`` is what an engine requires; ``text_of`` gives the `TokenText` of a token.

    The text of a prompt may spell special tokens, such as ``<|im_start|>``: whoever sends it writes
    all of it. The text of a message may not: there they are ordinary text.

    Raises:
      ConfigError: there is no tokenizer, or a file is damaged.
    """

    def __init__(self, folder: Path):
        plain = load_prompt_tokenizer(folder)
        assert plain.tokenizer is not None
        self._tokenizer = plain.tokenizer
        self.template: ChatTemplate | None = None
        if plain.folder is not None:
            self.template = load_template(plain.folder, self._tokenizer.special)
        named = self.template and self.template.names.get("eos_token")
        ends = self._encode(named, special=True) if named else []
        ends = ends if len(ends) == 1 else []  # the end of a turn, if it is a token
        self.stop_tokens = tuple(dict.fromkeys((*plain.stop_tokens, *ends)))
        self.plain: PromptTokenizer = dataclasses.replace(plain, stop_tokens=self.stop_tokens)
        self.text_of = functools.lru_cache(maxsize=1 << 16)(self._text_of)

    def prompt(self, text: str, beginning: bool = True) -> list[int]:
        """The tokens of a prompt, after those with which the model begins a text.

        Raises:
          ConfigError: ``text`` cannot be encoded, or gives no token.
        """
        tokens = self._encode(text, special=True)
        tokens = [*(self.plain.beginning(text) if beginning else ()), *tokens]
        check(len(tokens) > 0, "prompt", text, "must give at least one token")
        return tokens

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """The tokens of a chat after which the model answers; see `ChatTemplate`."""
        assert self.template is not None
        pieces = self.template.pieces(messages, tools)
        tokens = [t for text, special in pieces for t in self._encode(text, special)]
        check(len(tokens) > 0, "messages", messages, "must give at least one token")
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        return self.plain.decode(ids)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, special and bool(self._tokenizer.special))
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())
            raise ConfigError(f"prompt={text!r}: cannot be encoded: {reason}") from None

    def _text_of(self, token: int) -> TokenText:
        before = self._tokenizer.encode("a")[-1:]  # some decoders drop a space at the beginning

        def decode(special: bool) -> str:
            start = self._tokenizer.decode(before, special)
            return self._tokenizer.decode([*before, token], special)[len(start) :]

        text = decode(bool(self._tokenizer.special))
        raw = text.encode() if _DAMAGED not in text else self._bytes(token, text)
        return TokenText(text, raw, decode(False))

    def _bytes(self, token: int, text: str) -> bytes:
        """The bytes of a token that is part of a character."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return bytes([token])
        piece = self._tokenizer.token(token) or text
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        if all(letter in _BYTES for letter in piece):
            return bytes(_BYTES[letter] for letter in piece)
        return piece.encode()
