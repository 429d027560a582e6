"""What a run reads and how it becomes batches, as one frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from layers.config import ConfigError, check, check_choice
from research.data.synthetic import TASKS, generate

SOURCES = ("stdlib", "files", "hf", "synthetic")
PACKINGS = ("concat", "first_fit")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """A generated task: each example is a function of (seed, split, index) alone.

    Attributes:
      task: a name in `research.data.synthetic.TASKS`.
      vocab_size: number of token ids the task may use.
      parameters: keyword arguments of the task's function, e.g. ``{"distance": 96}``.
      examples: size of one training epoch, repeated and reshuffled; None never repeats an example.
      validation_examples: size of the (always identical) validation set.
    """

    task: str = "copy"
    vocab_size: int = 64
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    examples: int | None = None
    validation_examples: int = 512

    def __post_init__(self):
        check_choice("task", self.task, TASKS)
        check(self.vocab_size >= 4, "vocab_size", self.vocab_size, "must be at least 4")
        check(
            isinstance(self.parameters, Mapping),
            "parameters",
            self.parameters,
            "must be a mapping of the task's parameters",
        )
        check(
            self.examples is None or self.examples >= 1,
            "examples",
            self.examples,
            "must be at least 1, or None for a fresh example each time",
        )
        check(
            self.validation_examples >= 1,
            "validation_examples",
            self.validation_examples,
            "must be at least 1",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and the shape of a batch.

    Attributes:
      source: ``stdlib`` (the running Python's standard library, one document a file), ``files``
        (plain text, ``.jsonl``, ``.array_record``), ``hf`` (a Hugging Face dataset) or
        ``synthetic`` (a generated task).
      paths: files or globs (``**`` allowed) for ``files``; one name or directory for ``hf``.
      validation_paths: files held out by hand; else ``validation_fraction`` of the documents is.
      validation_fraction: share of documents held out by a hash: of the relative name for
        ``stdlib``, of the text elsewhere (so exact duplicates never straddle the split).
      text_field: the field of a JSONL object or of a Hugging Face row that holds the text.
      document_separator: splits a plain-text file into documents; empty: one document a file.
      hf_subset, hf_split: the dataset's configuration name and split.
      tokenizer: ``byte`` or the path of a ``tokenizer.json``.
      bos_token, eos_token: names of those tokens in ``tokenizer.json`` (unused by ``byte``).
      sequence_length: tokens a row; a longer document continues as further segments.
      batch_size: rows a step over all processes.
      packing: ``concat`` cuts the concatenated documents every ``sequence_length`` tokens (no
        padding); ``first_fit`` keeps a document that fits whole in one row (some padding).
      packing_bins: rows that ``first_fit`` fills at once: more rows, less padding.
      prefetch: batches made ahead in one background thread; 0 makes them on demand. A batch of
        text costs less than a thread switch, and JAX runs the step while the host makes the next
        batch, so a thread pays only for slow synthetic tasks on a machine with cores to spare.
      synthetic: the task, for ``source="synthetic"``.
    """

    source: str = "stdlib"
    paths: tuple[str, ...] = ()
    validation_paths: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    text_field: str = "text"
    document_separator: str = ""
    hf_subset: str | None = None
    hf_split: str = "train"
    tokenizer: str = "byte"
    bos_token: str = "<bos>"
    eos_token: str = "<eos>"
    sequence_length: int = 256
    batch_size: int = 8
    packing: str = "concat"
    packing_bins: int = 64
    prefetch: int = 0
    synthetic: SyntheticConfig = SyntheticConfig()

    def __post_init__(self):
        check_choice("source", self.source, SOURCES)
        check_choice("packing", self.packing, PACKINGS)
        check(
            self.sequence_length >= 2, "sequence_length", self.sequence_length, "must be at least 2"
        )
        check(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        check(self.packing_bins >= 1, "packing_bins", self.packing_bins, "must be at least 1")
        check(self.prefetch >= 0, "prefetch", self.prefetch, "must be 0 or more")
        check(
            0 <= self.validation_fraction < 1,
            "validation_fraction",
            self.validation_fraction,
            "must be in [0, 1)",
        )
        check(bool(self.text_field), "text_field", self.text_field, "must name a field")
        for field in ("paths", "validation_paths"):
            check(
                not isinstance(getattr(self, field), str),
                field,
                getattr(self, field),
                "must be a tuple of paths, not one string",
            )
        if self.source == "files":
            check(
                len(self.paths) >= 1,
                "paths",
                self.paths,
                "source='files' needs at least one path or glob",
            )
        elif self.source == "hf":
            check(
                len(self.paths) == 1,
                "paths",
                self.paths,
                "source='hf' needs exactly one dataset name or directory",
            )
        else:
            check(not self.paths, "paths", self.paths, f"source={self.source!r} reads no paths")
        check(
            self.source == "files" or not self.validation_paths,
            "validation_paths",
            self.validation_paths,
            "only source='files' reads validation_paths",
        )
        if self.source == "synthetic":
            # one example now, so that a parameter that cannot work fails here and not in a run
            try:
                generate(
                    self.synthetic.task,
                    (0,),
                    self.sequence_length + 1,
                    self.synthetic.vocab_size,
                    self.synthetic.parameters,
                )
            except ConfigError as error:
                raise ConfigError(f"synthetic.{error}") from None
