"""The one door to data: a `DataConfig` becomes a Grain dataset of batches.

Documents are read and tokenised once, into memory (2 bytes a token up to 65,536 ids, 4 beyond).
Everything after is Grain: shuffle, repeat, pack, batch, prefetch; so the iterator's state is a
few integers and a restored iterator goes on bit for bit.
"""

import dataclasses
import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import grain
import numpy as np

from layers.config import ConfigError, check, check_choice
from research.data.config import DataConfig, SyntheticConfig
from research.data.corpora import read_corpus, source_files
from research.data.packing import (
    Chunks,
    ConcatenatedRows,
    TokenizedDocuments,
    empty_row,
    finish,
    join,
)
from research.data.synthetic import generate
from research.data.tokenizers import load_tokenizer

SPLITS = ("train", "validation")
# Rows of an endless dataset: the largest length that Grain, which divides it as a float, keeps
# exact; 285 years at a million rows a second.
_ENDLESS = 2**53
# Elements are views into memory, so Grain's 16 reading threads would only cost.
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
    targets, positions, segment_ids int32 and weights float32. Process p holds rows
    ``p * share`` to ``(p + 1) * share`` of the global batch, so the processes' batches laid end
    to end are the batch of a single process, whatever ``process_count`` is.

    Args:
      split: ``train`` (shuffled anew each epoch) or ``validation`` (held-out documents, one fixed
        order that ``seed`` does not change).
      seed: of the shuffle and of synthetic examples.
      num_epochs: None is endless for ``train`` and 1 for ``validation``. A finite dataset ends
        with a batch filled up by rows of padding, so that no document is lost.

    Returns:
      A dataset whose iterator has ``get_state()`` (JSON-serialisable) and ``set_state()``.

    Raises:
      ConfigError: naming the field that cannot be used.
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
        fresh = split == "train" and config.synthetic.examples is None
        check(
            not (fresh and num_epochs),
            "num_epochs",
            num_epochs,
            "must be None while synthetic.examples is None: there is no end to an epoch",
        )
        dataset = grain.MapDataset.source(rows)
        # fresh examples are independent already, and endless: neither shuffled nor repeated
        if not fresh:
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
    """Number of token ids that batches of ``config`` may hold."""
    if config.source == "synthetic":
        return config.synthetic.vocab_size
    return load_tokenizer(config.tokenizer, config.bos_token, config.eos_token).vocab_size


def fingerprint(config: DataConfig) -> dict[str, Any]:
    """What identifies the data, for the record of a run: plain JSON values.

    A corpus: ``sha256`` over the names and bytes of all that is read, counts of files, bytes and
    documents, tokens (positions with a loss) an epoch of each split, tokenizer and its hash. A
    synthetic task: ``sha256`` over its first validation examples, which any change of generator
    or parameters changes.
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
    tokenizer = load_tokenizer(config.tokenizer, config.bos_token, config.eos_token)
    record = {
        "source": config.source,
        "sha256": loaded.sha256,
        "files": loaded.files,
        "bytes": loaded.bytes,
        "documents": {s: len(getattr(loaded, s).starts) - 1 for s in SPLITS},
        "tokens": {s: getattr(loaded, s).inputs for s in SPLITS},
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }
    if config.source == "stdlib":
        record["python"] = platform.python_version()
    return record


def _epochs(dataset: grain.MapDataset, seed: int, num_epochs: int | None) -> grain.MapDataset:
    """Shuffle anew each epoch. Grain hashes the seed, so seed 1 is not seed 0 an epoch later."""
    return dataset.seed(seed).shuffle().repeat(num_epochs or _ENDLESS // len(dataset))


def _share(
    dataset: grain.MapDataset,
    padding: dict[str, np.ndarray] | None,
    config: DataConfig,
    process_index: int,
    process_count: int,
) -> grain.IterDataset:
    """Batch this process' rows only: of every ``process_count`` shares, the one it owns.

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
    """Grain's first-fit packing. Every process packs the whole batch and keeps its rows.

    Which row a document falls in depends on all before it, so packing cannot be shared out;
    at millions of tokens a second it is cheap enough to repeat.
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
    mine = slice(process_index * share, (process_index + 1) * share)
    return packed.batch(config.batch_size, batch_fn=fill).map(
        lambda rows: finish({name: array[mine] for name, array in rows.items()})
    )


class _SyntheticRows:
    """Random access to examples: row ``index`` depends on (seed, split, index) alone."""

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
    files: int
    bytes: int


def _split_of(config: DataConfig, split: str) -> TokenizedDocuments:
    """The split's documents, or `ConfigError` when the held-out share leaves it empty."""
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
    return documents


def _load_cached(config: DataConfig) -> _Loaded:
    """Documents read and tokenised, kept while neither their fields nor a file change."""
    same = dataclasses.replace(
        config,
        sequence_length=2,
        batch_size=1,
        packing="concat",
        packing_bins=1,
        prefetch=0,
        synthetic=SyntheticConfig(),
    )
    files = source_files(config)
    if config.tokenizer != "byte" and os.path.exists(config.tokenizer):
        files.append(Path(config.tokenizer))
    stats = tuple((str(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files)
    return _load(same, stats)


@functools.lru_cache(maxsize=2)
def _load(config: DataConfig, stats: tuple) -> _Loaded:
    del stats  # only part of the cache's key
    tokenizer = load_tokenizer(config.tokenizer, config.bos_token, config.eos_token)
    corpus = read_corpus(config)
    train, validation = (
        join(tokenizer.encode_documents(d), tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)
        for d in (corpus.train, corpus.validation)
    )
    return _Loaded(train, validation, corpus.sha256, corpus.files, corpus.bytes)
