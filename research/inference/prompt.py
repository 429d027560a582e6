"""The tokenizer of a model: that of its run's data, or that of a Hugging Face directory."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check, from_mapping
from research.data import DataConfig, tokenizer_of
from research.data.tokenizer_file import TokenizerFile, special_names
from research.data.tokenizers import ByteTokenizer
from research.files import read_json
from research.models.companions import ORIGIN, is_hugging_face


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Encodes text as the beginning of a document, and decodes tokens to text.

    ``stop_tokens``: the tokens that end a document. ``to_json``: a ``tokenizer.json`` with all
    tokens. ``beginning``: the tokens with which the model begins a text; they are part of
    ``to_ids``. ``tokenizer``: what encodes without them. ``folder``: the tokenizer's files, if any.
    """

    to_ids: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]
    stop_tokens: tuple[int, ...]
    to_json: Callable[[], str]
    beginning: Callable[[str], list[int]] = lambda text: []
    tokenizer: ByteTokenizer | TokenizerFile | None = None
    folder: Path | None = None

    def encode(self, prompt: str) -> list[int]:
        """The tokens of ``prompt``, after those with which the model begins a document.

        Raises:
          ConfigError: ``prompt`` is not UTF-8, cannot be encoded, or gives no token.
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
        """The text of ``ids``."""
        return self.to_text(list(ids))


def load_prompt_tokenizer(workdir: Path | str, special_tokens: bool = False) -> PromptTokenizer:
    """The tokenizer of the run, the imported checkpoint or the Hugging Face directory ``workdir``.

    For a run, a prompt begins with the token that begins a document. Otherwise tokenizer.json
    defines the beginning, and the configuration names the tokens that end a text.

    Args:
      special_tokens: the text of a special token, e.g. ``<|im_start|>``, is that token, in prompts
        and in decoded text. Otherwise it is ordinary text in prompts, and special tokens are left
        out of decoded text.

    Raises:
      ConfigError: ``workdir`` has no tokenizer, or it cannot be read.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    check(path.exists(), "workdir", str(workdir), "must hold the config.json of a run")
    config: Any = read_json(path)
    origin = workdir if is_hugging_face(workdir) else workdir / ORIGIN
    exists = (origin / "tokenizer.json").is_file()
    if "data" not in config:
        name = "tokenizer.json" if origin == workdir else f"{ORIGIN}/tokenizer.json"
        check(exists, "workdir", str(workdir), f"must hold {name}")
        return _from_import(origin, special_tokens)
    data = from_mapping(DataConfig, config["data"], "data")
    check(data.source != "synthetic", "data.source", data.source, "generation requires text")
    if exists and data.tokenizer != "byte":  # as it was when the run began
        data = dataclasses.replace(data, tokenizer=str(origin / "tokenizer.json"))
    return _from_data(data, origin if exists else None, special_tokens)


def _from_data(data: DataConfig, folder: Path | None, special_tokens: bool) -> PromptTokenizer:
    tokenizer = tokenizer_of(data)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    return PromptTokenizer(
        lambda text: [*bos, *tokenizer.encode(text, special_tokens)],
        lambda ids: tokenizer.decode(ids, special_tokens),
        tokenizer.stop_tokens,
        tokenizer.to_json,
        lambda _: bos,
        tokenizer,
        folder,
    )


def _from_import(origin: Path, special_tokens: bool) -> PromptTokenizer:
    path = str(origin / "tokenizer.json")
    tokenizer = TokenizerFile(path, tuple(special_names(path).values()))
    return PromptTokenizer(
        lambda text: [*tokenizer.beginning(text), *tokenizer.encode(text, special_tokens)],
        lambda ids: tokenizer.decode(ids, special_tokens),
        _stop_tokens(origin),
        tokenizer.to_json,
        tokenizer.beginning,
        tokenizer,
        origin,
    )


def _stop_tokens(origin: Path) -> tuple[int, ...]:
    """The ids that end a text: from generation_config.json, or from config.json."""
    for name in ("generation_config.json", "config.json"):
        path = origin / name
        content = read_json(path) if path.is_file() else {}
        check(isinstance(content, dict), "file", str(path), "must hold an object")
        ids = content.get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            valid = all(type(i) is int and i >= 0 for i in ids)
            check(valid, "eos_token_id", ids, f"must be ids in {str(path)!r}")
            return tuple(ids)
    return ()
