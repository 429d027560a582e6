"""Inference: sampling and cached generation."""

from research.inference.generate import generate
from research.inference.sampling import SamplingConfig, sample
from research.inference.text import TextStream

__all__ = ["SamplingConfig", "TextStream", "generate", "sample"]
