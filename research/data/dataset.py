"""Makes a Grain dataset of batches from a `DataConfig`.

Documents are read and tokenised once, into memory (2 bytes per token up to 65,536 ids, else 4).
Grain does the rest: shuffle, repeat, pack, batch, prefetch. So the iterator's state is a few
integers, and a restored iterator continues bit for bit.
"""

import dataclasses
import functools
import hashlib
import os
from typing import Any

import grain
import numpy as np

from layers.config import ConfigError, check, check_choice
from research.data.config import DataConfig, SyntheticConfig
from research.data.corpora import Part, read_corpus, source_files
from research.data.packing import (
    Chunks,
    ConcatenatedRows,
    TokenizedDocuments,
    empty_row,
    finish,
    join,
)
from research.data.synthetic import generate
from research.data.tokenizers import ByteTokenizer, JsonTokenizer, load_tokenizer

SPLITS = ("train", "validation")
# Rows of an endless dataset: Grain divides the length as a float, which is exact up to this number.
# It is 285 years at a million rows per second.
_ENDLESS = 2**53
_LISTED = 1000  # parts that a fingerprint lists one by one
# Elements are views into memory: Grain's 16 reading threads would only add time.
_IN_LINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def make_dataset(
    config: DataConfig,
    split: str = "train",
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
) -> grain.IterDataset:
    """Batches of ``config`` for this process.

    A batch is a dict of NumPy arrays ``[batch_size / process_count, sequence_length]``: tokens,
    targets, positions, segment_ids int32 and weights float32. Process p has the rows
    ``p * share`` to ``(p + 1) * share`` of the global batch. So the concatenated batches of the
    processes are the batch of a single process, for every ``process_count``.

    Args:
      split: ``train`` (shuffled again each epoch) or ``validation`` (held-out documents in a fixed
        order that does not depend on ``seed``).
      seed: of the shuffle and of synthetic examples.
      num_epochs: None: endless for ``train``, 1 for ``validation``. The last batch of a finite
        dataset is filled with rows of padding, so that no document is lost.

    Returns:
      A dataset whose iterator has ``get_state()`` (JSON-serialisable) and ``set_state()``.

    Raises:
      ConfigError: an invalid field or argument; the message names it.
    """
    check_choice("split", split, SPLITS)
    check(0 <= seed < 2**31, "seed", seed, "must be in [0, 2**31)")
    check(process_count >= 1, "process_count", process_count, "must be at least 1")
    check(
        0 <= process_index < process_count,
        "process_index",
        process_index,
        f"must be in [0, {process_count})",
    )
    check(
        config.batch_size % process_count == 0,
        "batch_size",
        config.batch_size,
        f"must be divisible by process_count {process_count}",
    )
    check(
        num_epochs is None or num_epochs >= 1,
        "num_epochs",
        num_epochs,
        "must be at least 1, or None",
    )
    if split == "validation":
        seed, num_epochs = 0, num_epochs or 1
    if config.source == "synthetic":
        rows = _SyntheticRows(config, split, seed)
        endless = split == "train" and config.synthetic.examples is None
        check(
            not (endless and num_epochs),
            "num_epochs",
            num_epochs,
            "must be None while synthetic.examples is None: an epoch has no end",
        )
        dataset = grain.MapDataset.source(rows)
        # new examples are independent and endless: no shuffle and no repeat
        if not endless:
            dataset = _epochs(dataset, seed, num_epochs)
        padding = rows.empty() if num_epochs else None
        batches = _share(dataset, padding, config, process_index, process_count)
    else:
        documents = _split_of(config, split)
        if config.packing == "concat":
            rows = ConcatenatedRows(documents, config.sequence_length)
            dataset = _epochs(grain.MapDataset.source(rows), seed, num_epochs)
            empty = empty_row(config.sequence_length, documents.tokens.dtype)
            padding = empty if num_epochs else None
            batches = _share(dataset, padding, config, process_index, process_count).map(finish)
        else:
            batches = _first_fit(documents, config, seed, num_epochs, process_index, process_count)
    if config.prefetch:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=config.prefetch
        )
    return batches


def vocabulary_size(config: DataConfig) -> int:
    """The largest token id that batches of ``config`` may contain, plus 1."""
    if config.source == "synthetic":
        return config.synthetic.vocab_size
    return tokenizer_of(config).vocab_size


def tokenizer_of(config: DataConfig) -> ByteTokenizer | JsonTokenizer:
    """The tokenizer of the documents of ``config``.

    Raises:
      ConfigError: ``config`` has no text, or see `load_tokenizer`.
    """
    check(config.source != "synthetic", "source", config.source, "has no text and no tokenizer")
    return load_tokenizer(config.tokenizer, config.bos_token, config.eos_token)


def fingerprint(config: DataConfig) -> dict[str, Any]:
    """The values that identify the data in the record of a run, in JSON's types.

    For a corpus: ``sha256`` over all that is read, ``parts`` (each file or dataset with its own
    hash, if they are at most 1000), counts of files, bytes and documents, tokens (positions with a
    loss) per epoch of each split, the tokenizer and its hash. For a synthetic task: ``sha256`` over
    its first validation examples, which depends on the generator and its parameters.
    `research.data.what_changed` compares two of them.
    """
    if config.source == "synthetic":
        rows = _SyntheticRows(config, "validation", 0)
        digest = hashlib.sha256()
        for index in range(min(64, len(rows))):
            for name, array in sorted(rows[index].items()):
                digest.update(name.encode() + array.tobytes())
        task = config.synthetic
        return {
            "source": "synthetic",
            "task": task.task,
            "parameters": dict(task.parameters),
            "sequence_length": config.sequence_length,
            "vocab_size": task.vocab_size,
            "sha256": digest.hexdigest(),
        }
    loaded = _load_cached(config)
    tokenizer = tokenizer_of(config)
    record = {
        "source": config.source,
        "sha256": loaded.sha256,
        "files": sum(part.files for part in loaded.parts),
        "bytes": sum(part.bytes for part in loaded.parts),
        "documents": {s: len(getattr(loaded, s).starts) - 1 for s in SPLITS},
        "tokens": {s: getattr(loaded, s).inputs for s in SPLITS},
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }
    if len(loaded.parts) <= _LISTED:
        record["parts"] = [dataclasses.asdict(part) for part in loaded.parts]
    return record


def _epochs(dataset: grain.MapDataset, seed: int, num_epochs: int | None) -> grain.MapDataset:
    """Shuffle each epoch anew. Grain hashes the seed: seed 1 is not seed 0 one epoch later."""
    return dataset.seed(seed).shuffle().repeat(num_epochs or _ENDLESS // len(dataset))


def _share(
    dataset: grain.MapDataset,
    padding: dict[str, np.ndarray] | None,
    config: DataConfig,
    process_index: int,
    process_count: int,
) -> grain.IterDataset:
    """Batches of this process's rows only: every ``process_count``-th share of a batch.

    ``padding`` is the row that fills the last batch of a finite dataset.
    """
    missing = -len(dataset) % config.batch_size
    if padding is not None and missing:
        ends = grain.MapDataset.source([padding] * missing)
        dataset = grain.MapDataset.concatenate([dataset, ends])
    shares = dataset.batch(config.batch_size // process_count)
    return shares[process_index::process_count].to_iter_dataset(_IN_LINE)


def _first_fit(
    documents: TokenizedDocuments,
    config: DataConfig,
    seed: int,
    num_epochs: int | None,
    process_index: int,
    process_count: int,
) -> grain.IterDataset:
    """Batches by Grain's first-fit packing. Each process packs the global batch, keeps its rows.

    The row of a document depends on all documents before it, so the processes cannot divide the
    packing. At millions of tokens per second it is cheap enough for each process to repeat it.
    """
    chunks = grain.MapDataset.source(Chunks(documents, config.sequence_length))
    packed = grain.experimental.FirstFitPackIterDataset(
        _epochs(chunks, seed, num_epochs).to_iter_dataset(_IN_LINE),
        length_struct={"pairs": config.sequence_length},
        num_packing_bins=config.packing_bins,
        seed=seed,
    )
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=config.batch_size)
    share = config.batch_size // process_count
    own_rows = slice(process_index * share, (process_index + 1) * share)
    return packed.batch(config.batch_size, batch_fn=fill).map(
        lambda rows: finish({name: array[own_rows] for name, array in rows.items()})
    )


class _SyntheticRows:
    """Random access to examples: a row depends only on (seed, split, index)."""

    def __init__(self, config: DataConfig, split: str, seed: int):
        self._task, self._length = config.synthetic, config.sequence_length
        self._key = (SPLITS.index(split), seed)
        sizes = {"train": self._task.examples, "validation": self._task.validation_examples}
        self._size = sizes[split] or _ENDLESS

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, weights, answers = generate(
            self._task.task,
            (*self._key, index),
            self._length + 1,
            self._task.vocab_size,
            self._task.parameters,
        )
        return {
            "tokens": tokens[:-1],
            "targets": answers[1:],
            "positions": np.arange(self._length, dtype=np.int32),
            "segment_ids": np.ones(self._length, np.int32),
            "weights": weights[1:],
        }

    def empty(self) -> dict[str, np.ndarray]:
        """A row of padding."""
        padding = {name: np.zeros_like(array) for name, array in self[0].items()}
        return padding | {"positions": np.full(self._length, -1, np.int32)}


@dataclasses.dataclass(frozen=True)
class _Loaded:
    train: TokenizedDocuments
    validation: TokenizedDocuments
    sha256: str
    parts: list[Part]


def _split_of(config: DataConfig, split: str) -> TokenizedDocuments:
    """The documents of ``split``; raises `ConfigError` if there are none."""
    loaded = _load_cached(config)
    documents = getattr(loaded, split)
    if len(documents.starts) == 1:
        total = len(loaded.train.starts) + len(loaded.validation.starts) - 2
        if config.validation_paths:
            raise ConfigError(
                f"{'paths' if split == 'train' else 'validation_paths'}: no document with any text"
            )
        raise ConfigError(
            f"validation_fraction={config.validation_fraction}: leaves none of {total} documents "
            f"for {split}; change it, or for files give validation_paths"
        )
    check(
        documents.inputs > 0,
        "tokenizer",
        config.tokenizer,
        f"encodes every document for {split} by no token",
    )
    return documents


def _load_cached(config: DataConfig) -> _Loaded:
    """Read and tokenise the documents; cached until one of their fields or a file changes."""
    document_config = dataclasses.replace(
        config,
        sequence_length=2,
        batch_size=1,
        packing="concat",
        packing_bins=1,
        prefetch=0,
        synthetic=SyntheticConfig(),
    )
    stats = [(str(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in source_files(config)]
    return _load(document_config, (tokenizer_of(config).sha256, *stats))


@functools.lru_cache(maxsize=2)
def _load(config: DataConfig, stats: tuple) -> _Loaded:
    del stats  # only part of the cache's key
    tokenizer = tokenizer_of(config)
    corpus = read_corpus(config)
    encoded = [tokenizer.encode_documents(d) for d in (corpus.train, corpus.validation)]
    check(
        any(len(ids) for documents in encoded for ids in documents),
        "tokenizer",
        config.tokenizer,
        "encodes every document by no token",
    )
    train, validation = (
        join(ids, tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) for ids in encoded
    )
    return _Loaded(train, validation, corpus.sha256, corpus.parts)
