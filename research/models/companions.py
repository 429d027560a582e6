"""The files beside a model's weights: its tokenizer, and its special tokens by name and by id.

An imported checkpoint has them in the folder `ORIGIN`. A run on text gets them from the folder of
its ``tokenizer.json``, so a model that is imported, fine-tuned and exported keeps them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check
from research.data import DataConfig, tokenizer_of
from research.data.tokenizer_file import NAMING, named_token
from research.data.tokenizers import ByteTokenizer
from research.files import read_json, write_text
from research.models.families import family_of

# of a model besides its configuration and weights
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
# a folder with `COMPANIONS`, and a config.json of Hugging Face or only its `TOKEN_IDS`
ORIGIN = "hugging_face"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(source: Path, to: Path) -> None:
    """Copy the `COMPANIONS` that ``source`` has."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)


def is_hugging_face(folder: Path) -> bool:
    """Whether the config.json in ``folder`` is Hugging Face's, not that of a run."""
    content = _content(folder / "config.json")
    named = content.get("architectures") or content.get("model_type")
    return bool(named) and "model" not in content


def family_name(origin: Path) -> str | None:
    """The family of the config.json in ``origin``, or None if it has none that is supported."""
    path = origin / "config.json"
    hf = read_json(path) if path.is_file() else None
    if not isinstance(hf, dict) or not (hf.get("architectures") or hf.get("model_type")):
        return None
    try:
        return family_of(hf).model_type
    except ConfigError:
        return None


def write_companions(data: DataConfig | None, origin: Path, start: Path | None = None) -> None:
    """Write the companions of a run to ``origin``: its tokenizer, and what is beside it.

    The names and ids of the tokens that begin and end a text become those of ``data``. Bytes get a
    ``tokenizer.json`` with the same ids. A run without text has the companions of its ``start``.

    Args:
      start: the folder `ORIGIN` of the model that the run starts from; it has the family.
    """
    if data is None or data.source == "synthetic":
        if start is not None and start.is_dir():
            shutil.copytree(start, origin, dirs_exist_ok=True)
        return
    tokenizer = tokenizer_of(data)
    origin.mkdir(exist_ok=True)
    described = {}
    if isinstance(tokenizer, ByteTokenizer):
        (origin / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        bos, eos = tokenizer.names
    else:
        source = Path(data.tokenizer).parent
        if source.resolve() != origin.resolve():
            copy_companions(source, origin)
            shutil.copyfile(data.tokenizer, origin / "tokenizer.json")
        if family_name(source):
            described = _content(source / "config.json")
        bos = None if tokenizer.bos is None else tokenizer.token(tokenizer.bos)
        eos = tokenizer.token(tokenizer.eos)
    if start is not None and family_name(start):
        # ids are those of the tokenizer, whatever tokenizer the start had
        ids = {name: described.get(name) for name in TOKEN_IDS}
        described = {**_content(start / "config.json"), **ids}
    for name in NAMING:
        path = origin / name
        new = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == NAMING[0] else None
        _change(path, _names(_content(path), bos, eos), new)
    described |= _ids(described, tokenizer.bos, tokenizer.eos)
    _change(origin / "config.json", described, {})
    path = origin / "generation_config.json"
    _change(path, _ids(_content(path), tokenizer.bos, tokenizer.eos), None)


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    check(isinstance(content, dict), "file", str(path), "must hold an object")
    return content


def _names(content: Mapping[str, Any], bos: str | None, eos: str | None) -> dict[str, Any]:
    """The names that ``content`` lacks."""
    names = {"bos_token": bos, "eos_token": eos}
    return {
        field: name
        for field, name in names.items()
        if name is not None and named_token(content, field) != name
    }


def _ids(content: Mapping[str, Any], bos: int | None, eos: int) -> dict[str, Any]:
    """The ids that ``content`` lacks; several tokens may end a text."""
    ids = {} if bos is None else {"bos_token_id": bos}
    ends = content.get("eos_token_id")
    ended = eos in (ends if isinstance(ends, list) else [ends])
    return ids if ended else {**ids, "eos_token_id": eos}


def _change(path: Path, fields: Mapping[str, Any], new: Mapping[str, Any] | None) -> None:
    """Set ``fields`` of the JSON object at ``path``; ``new``: of a file that is absent, or None."""
    if path.is_file() or new is not None:
        content = {**(_content(path) or new or {}), **fields}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
