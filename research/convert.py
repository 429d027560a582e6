"""Converts Hugging Face directories to checkpoints for training and generation, and back."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layers.architecture import DTYPES
from layers.config import check, check_choice
from layers.decoder import Decoder, DecoderConfig
from research.files import check_new, new_directory
from research.models.companions import ORIGIN, copy_companions, family_name
from research.models.families import FAMILIES, decoder_config, text_config
from research.models.fields import Fields
from research.models.load import load, open_model, read_object
from research.models.save import save
from research.training import load_model, save_model


def import_directory(
    source: Path, to: Path, *, param_dtype: str | None = None, context: int | None = None
) -> str:
    """Convert the model in ``source`` to a checkpoint ``to`` for `research.training.load_model`.

    Args:
      source: a Hugging Face directory, or an RWKV-7 ``.pth`` file.
      param_dtype: default: that of config.json (or of the file's embedding), or float32.
      context: the number of tokens that rotations which depend on it are for; see
        `research.models.load`.

    Returns:
      The dtype of the parameters.

    Raises:
      ConfigError: an error of `research.models.load`, a dtype in config.json that parameters cannot
        have, or ``to`` is neither absent nor empty.
    """
    check_new(to)
    hf, _ = open_model(source)
    model = load_directory(source, param_dtype=param_dtype, context=context)
    with new_directory(to) as fresh:
        save_model(model, fresh)
        (fresh / ORIGIN).mkdir()
        if source.is_dir():
            shutil.copyfile(source / "config.json", fresh / ORIGIN / "config.json")
            copy_companions(source, fresh / ORIGIN)
        else:
            (fresh / ORIGIN / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    return model.config.param_dtype


def load_directory(
    source: Path, *, param_dtype: str | None = None, context: int | None = None
) -> Decoder:
    """The model in ``source``, with parameters of the dtype that it has there.

    Args and errors: see `import_directory`.
    """
    hf, _ = open_model(source)
    param_dtype = _dtype(hf) if param_dtype is None else param_dtype
    check_choice("param_dtype", param_dtype, DTYPES)
    return load(source, param_dtype=param_dtype, context=context)


def directory_config(source: Path) -> DecoderConfig:
    """The configuration of what `load_directory` gives; no weights are read.

    Raises:
      ConfigError: a missing or damaged config.json, or an unsupported architecture or dtype.
    """
    hf = read_object(source / "config.json")
    return dataclasses.replace(decoder_config(hf), param_dtype=_dtype(hf))


def _dtype(hf: Mapping[str, Any]) -> str:
    """The dtype that a config.json names, or float32."""
    fields = Fields({**text_config(hf), **hf})
    named = [fields.text(name, None, choices=DTYPES) for name in ("dtype", "torch_dtype")]
    return named[0] or named[1] or "float32"


def export_checkpoint(source: Path, to: Path, *, family: str | None = None) -> None:
    """Convert the model in the workdir ``source`` to a directory ``to`` for transformers.

    The files of its tokenizer are copied (`research.models.companions`).

    transformers does not support RWKV-7. For it ``to`` may be a ``.pth`` file, which the `rwkv`
    package loads; a directory can be read by `research.models.load` only.

    Args:
      family: default: that of the directory that ``source`` was imported from, or in which the
        tokenizer of the run ``source`` was.

    Raises:
      ConfigError: ``source`` has no model, or neither it nor ``family`` names a family; the family
        does not support the model; ``to`` is neither absent nor empty.
    """
    check_new(to)
    origin = source / ORIGIN
    family = family or family_name(origin)
    known = ", ".join(FAMILIES)
    check(family is not None, "family", None, f"not an imported model: must be one of {known}")
    assert family is not None
    check_choice("family", family, FAMILIES)
    described = (origin / "config.json").is_file()
    save(load_model(source), to, family, source=origin if described else None)
