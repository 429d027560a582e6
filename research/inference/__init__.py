"""Inference: sampling and cached generation."""

from research.inference.generate import generate
from research.inference.prompt import PromptTokenizer, load_prompt_tokenizer
from research.inference.sampling import Sampled, SamplingConfig, SamplingRows, sample
from research.inference.text import TextStream

__all__ = [
    "PromptTokenizer",
    "Sampled",
    "SamplingConfig",
    "SamplingRows",
    "TextStream",
    "generate",
    "load_prompt_tokenizer",
    "sample",
]
