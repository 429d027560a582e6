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
from research.models.families.rwkv import RWKVS
from research.models.families.unused import refuse_other_functions, warn_of_the_rest
from research.models.fields import Fields, short

__all__ = ["FAMILIES", "Family", "decoder_config", "family_of"]

FAMILIES = {
    family.model_type: family for family in (*LLAMAS, *GEMMAS, *GPTS, *MIXTURES, *MAMBAS, *RWKVS)
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
        if named and named[0] == family.architecture:
            if kind not in (None, family.model_type):
                requirement = f"must be {family.model_type} for architectures={named}"
                fields.refuse("model_type", kind, requirement)
            return family
        if not named and kind == family.model_type:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    name = short(named[0] if named else kind)
    raise ConfigError(f"architecture={name}: must be one of {supported}")


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a config.json.

    Warns, in one line, of fields that are not applied: those that only change training, such as
    dropout, and those that nobody knows.

    Raises:
      ConfigError: an unsupported architecture or feature, or a field that is missing or has a wrong
        type or value; the message names it.
    """
    family, fields = family_of(hf), Fields(hf)
    for name in ("architectures", "model_type"):
        fields.unused(name)
    refuse_other_functions(fields)
    config = family.read(fields)
    warn_of_the_rest(fields, family.unused, family.architecture)
    return config
