"""Model families: reads and writes Hugging Face directories, with one table per family."""

from research.models.families import FAMILIES, Family, decoder_config, family_of
from research.models.load import load
from research.models.save import save

__all__ = [
    "FAMILIES",
    "Family",
    "decoder_config",
    "family_of",
    "load",
    "save",
]
