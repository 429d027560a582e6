"""Data: corpora, tokenizers, packing and synthetic tasks, as Grain datasets of batches."""

from research.data.changes import what_changed
from research.data.config import DataConfig, SyntheticConfig
from research.data.corpora import read_corpus
from research.data.dataset import fingerprint, make_dataset, tokenizer_of, vocabulary_size
from research.data.synthetic import TASKS
from research.data.tokenizers import load_tokenizer, train_bpe

__all__ = [
    "TASKS",
    "DataConfig",
    "SyntheticConfig",
    "fingerprint",
    "load_tokenizer",
    "make_dataset",
    "read_corpus",
    "tokenizer_of",
    "train_bpe",
    "vocabulary_size",
    "what_changed",
]
