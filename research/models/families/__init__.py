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

__all__ = ["FAMILIES", "Family", "decoder_config", "family_of"]

FAMILIES = {
    family.model_type: family for family in (*LLAMAS, *GEMMAS, *GPTS, *MIXTURES, *MAMBAS, *RWKVS)
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ConfigError: an unsupported architecture; the message names it and the supported ones.
    """
    named = (hf.get("architectures") or [None])[0]
    for family in FAMILIES.values():
        if named == family.architecture or (
            named is None and hf.get("model_type") == family.model_type
        ):
            return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ConfigError(f"architecture={named or hf.get('model_type')!r}: must be one of {supported}")


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a config.json.

    Raises:
      ConfigError: an unsupported architecture or feature, or a missing field; the message names it.
    """
    family = family_of(hf)
    try:
        return family.read(hf)
    except KeyError as missing:
        raise ConfigError(f"config.json: {missing.args[0]} is missing") from None
