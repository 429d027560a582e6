"""The tokenizer of a checkpoint: that of its run's data, or the one it was imported with."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from layers.config import ConfigError, check, from_mapping
from research.data import DataConfig, load_tokenizer
from research.files import read_json
from research.models.save import ORIGIN


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Text to the tokens that begin a document, and tokens back to text.

    ``stop_tokens``: those that end a document.
    """

    to_ids: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]
    stop_tokens: tuple[int, ...]

    def encode(self, prompt: str) -> list[int]:
        """The tokens of ``prompt``, with what the model expects before a document.

        Raises:
          ConfigError: ``prompt`` is not UTF-8, is unknown to the tokenizer, or gives no token.
        """
        try:
            prompt.encode()
            ids = self.to_ids(prompt)
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())
            raise ConfigError(f"prompt={prompt!r}: cannot be encoded: {reason}") from None
        check(len(ids) > 0, "prompt", prompt, "must give at least one token")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens are left out."""
        return self.to_text(list(ids))


def load_prompt_tokenizer(workdir: Path | str) -> PromptTokenizer:
    """The tokenizer of the run or the imported checkpoint in ``workdir``.

    A prompt of a run begins with the token that begins its documents. Of an imported checkpoint it
    begins as its tokenizer.json says, and its configuration says which tokens end a text.

    Raises:
      ConfigError: ``workdir`` names no tokenizer, or one that cannot be read.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    check(path.exists(), "workdir", str(workdir), "holds no config.json of a run")
    held: Any = read_json(path)
    if "data" in held:
        return _of_data(from_mapping(DataConfig, held["data"], "data"))
    origin = workdir / ORIGIN
    there = (origin / "tokenizer.json").is_file()
    check(there, "workdir", str(workdir), f"holds no {ORIGIN}/tokenizer.json")
    return _of_import(origin)


def _of_data(data: DataConfig) -> PromptTokenizer:
    check(data.source != "synthetic", "data.source", data.source, "has no text to generate")
    own = load_tokenizer(data.tokenizer, data.bos_token, data.eos_token)
    return PromptTokenizer(lambda text: [own.bos, *own.encode(text)], own.decode, (own.eos,))


def _of_import(origin: Path) -> PromptTokenizer:
    path = origin / "tokenizer.json"
    try:
        own = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a bad file
        reason = " ".join(str(error).split())
        raise ConfigError(f"file={str(path)!r}: cannot be read: {reason}") from None
    own.no_truncation()
    own.no_padding()
    return PromptTokenizer(lambda text: own.encode(text).ids, own.decode, _stops(origin))


def _stops(origin: Path) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = origin / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
