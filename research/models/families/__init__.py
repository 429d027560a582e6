"""The families of checkpoints: each reads and writes its configuration and has a table of rows."""

from collections.abc import Mapping
from typing import Any

from layers.config import ConfigError
from layers.decoder import DecoderConfig
from research.models.families.family import Family
from research.models.families.gemma import GEMMAS
from research.models.families.gpt import GPTS
from research.models.families.llama import LLAMAS
from research.models.families.mamba import MAMBAS
from research.models.families.mixture import MIXTURES
from research.models.families.mpt import MPT
from research.models.families.rwkv import RWKVS
from research.models.families.unused import refuse_other_functions, warn_of_the_rest
from research.models.fields import Fields, short
from research.models.fp8 import read_block

__all__ = ["FAMILIES", "Family", "decoder_config", "family_of", "text_config"]

TEXT = "text_config"  # the object of a composite model's config.json that describes its text part

FAMILIES = {
    family.model_type: family
    for family in (*LLAMAS, *GEMMAS, *GPTS, MPT, *MIXTURES, *MAMBAS, *RWKVS)
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ConfigError: an unsupported architecture; the message names it and the supported ones.
    """
    fields = Fields(hf)
    named = fields.texts("architectures", [], null=[])
    if len(named) > 1:
        fields.refuse("architectures", named, "must name one")
    kind = fields.text("model_type", None)
    for family in FAMILIES.values():
        for model_type, architectures in family.kinds.items():
            if named and named[0] in architectures:
                if kind not in (None, model_type):
                    requirement = f"must be {model_type} for architectures={named}"
                    fields.refuse("model_type", kind, requirement)
                return family
            if not named and kind == model_type:
                return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    name = short(named[0] if named else kind)
    raise ConfigError(f"architecture={name}: must be one of {supported}")


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model: those of the file, or of a composite model's text part.

    Raises:
      ConfigError: an unsupported architecture, or a text part that is not an object.
    """
    fields = Fields(hf)
    return fields.object(TEXT).values if _has_text_part(fields, family_of(hf)) else hf


def _has_text_part(fields: Fields, family: Family) -> bool:
    return bool(family.composite) and TEXT in fields


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a config.json.

    Warns, in one line, of fields that are not applied: those that only change training, such as
    dropout, and those that nobody knows.

    Raises:
      ConfigError: an unsupported architecture or feature, or a field that is missing or has a wrong
        type or value; the message names it.
    """
    family, fields = family_of(hf), Fields(hf)
    read_block(fields)
    config = family.read(_text_fields(fields, family))
    warn_of_the_rest(fields, family.unused, family.architecture)
    return config


def _text_fields(fields: Fields, family: Family) -> Fields:
    """The fields of the language model, after those that only say what the file holds."""
    parts = [fields]
    if _has_text_part(fields, family):
        text = fields.object(TEXT)
        # the whole model has the embedding of its text part
        fields.only(tie_word_embeddings=text.flag("tie_word_embeddings", True))
        text.only(model_type=family.model_type, quantization_config=None)
        parts.append(text)
    for part in parts:
        for name in ("architectures", "model_type"):
            part.unused(name)
        refuse_other_functions(part)
    return parts[-1]
