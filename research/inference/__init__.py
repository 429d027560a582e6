"""Inference: sampling and cached generation."""

from research.inference.generate import generate
from research.inference.prompt import PromptTokenizer, load_prompt_tokenizer
from research.inference.sampling import SamplingConfig, sample
from research.inference.text import TextStream

__all__ = [
    "PromptTokenizer",
    "SamplingConfig",
    "TextStream",
    "generate",
    "load_prompt_tokenizer",
    "sample",
]
