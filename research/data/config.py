"""The data of a run and how it becomes batches, as one frozen dataclass."""

import dataclasses
from typing import Any

from layers.config import ConfigError, check, check_choice, check_types
from research.data.synthetic import TASKS, generate
from research.memory import host_memory, spell

# of a generated example, its tokens, labels and weights and what their task computes, per token
_EXAMPLE_BYTES = 64

SOURCES = ("stdlib", "files", "hf", "synthetic")
PACKINGS = ("concat", "first_fit")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """A generated task: an example depends only on (seed, split, index).

    Attributes:
      task: a name in `research.data.synthetic.TASKS`.
      vocab_size: number of token ids that the task may use.
      parameters: keyword arguments of the task's function, e.g. ``{"distance": 96}``.
      examples: size of a training epoch, reshuffled and repeated; None: no example is repeated.
      validation_examples: size of the validation set, which is always the same.
    """

    task: str = "copy"
    vocab_size: int = 64
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    examples: int | None = None
    validation_examples: int = 512

    def __post_init__(self):
        check_types(self)
        check_choice("task", self.task, TASKS)
        check(self.vocab_size >= 4, "vocab_size", self.vocab_size, "must be at least 4")
        check(
            self.examples is None or self.examples >= 1,
            "examples",
            self.examples,
            "must be at least 1, or None for a new example each time",
        )
        check(
            self.validation_examples >= 1,
            "validation_examples",
            self.validation_examples,
            "must be at least 1",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the tokens and the shape of a batch.

    Attributes:
      source: ``stdlib`` (the running Python's standard library, a document per file), ``files``
        (plain text, ``.jsonl`` or ``.ndjson``, ``.json`` with an array of objects,
        ``.array_record``; text may be compressed, see `research.data.formats`), ``hf`` (a Hugging
        Face dataset) or ``synthetic`` (a generated task).
      paths: files or globs (``**`` allowed) for ``files``; one name or directory for ``hf``. A file
        is read once, however often it is named.
      validation_paths: held-out files, none of which may be read for training too; if empty,
        ``validation_fraction`` decides.
      validation_fraction: the share of documents that is held out, by a hash of the relative name
        for ``stdlib`` and of the text otherwise (so exact duplicates are in the same split).
      text_field: the field of a JSON object or of a Hugging Face row that holds the text.
      document_separator: splits a plain-text file into documents; empty: a document per file. Line
        ends in plain text and here are ``\\n``, also where the file has ``\\r\\n`` or ``\\r``.
      hf_subset, hf_split: the dataset's configuration name and split.
      tokenizer: ``byte`` or the path of a ``tokenizer.json``.
      bos_token, eos_token: the tokens of ``tokenizer.json`` that begin and end a document. None:
        those that tokenizer_config.json or special_tokens_map.json beside it name; without such
        files, ``<bos>`` and ``<eos>``. An empty ``bos_token``: none.
      sequence_length: tokens per row; a longer document continues as further segments.
      batch_size: rows per step over all processes.
      packing: ``concat`` cuts the concatenated documents every ``sequence_length`` tokens (no
        padding); ``first_fit`` keeps a document that fits whole in one row (some padding).
      packing_bins: rows that ``first_fit`` fills at once; more rows give less padding.
      prefetch: batches prepared ahead in a background thread; 0: on demand. A batch of text costs
        less than a thread switch, and JAX runs the step while the host prepares the next batch. So
        a thread is faster only for slow synthetic tasks on a machine with idle cores.
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
    bos_token: str | None = None
    eos_token: str | None = None
    sequence_length: int = 256
    batch_size: int = 8
    packing: str = "concat"
    packing_bins: int = 64
    prefetch: int = 0
    synthetic: SyntheticConfig = SyntheticConfig()

    def __post_init__(self):
        check_types(self)
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
        if self.source == "files":
            check(
                len(self.paths) >= 1,
                "paths",
                self.paths,
                "source='files' requires at least one path or glob",
            )
        elif self.source == "hf":
            check(
                len(self.paths) == 1,
                "paths",
                self.paths,
                "source='hf' requires exactly one dataset name or directory",
            )
        else:
            check(not self.paths, "paths", self.paths, f"source={self.source!r} reads no paths")
        check(
            self.source == "files" or not self.validation_paths,
            "validation_paths",
            self.validation_paths,
            "only source='files' reads validation_paths",
        )
        readers = {"text_field": ("files", "hf"), "document_separator": ("files",)}
        readers |= dict.fromkeys(("hf_subset", "hf_split"), ("hf",))
        for field, sources in readers.items():
            value = getattr(self, field)
            check(
                self.source in sources or value == getattr(DataConfig, field),
                field,
                value,
                f"source={self.source!r} does not read it",
            )
        if self.source == "synthetic":
            needed, memory = _EXAMPLE_BYTES * self.sequence_length, host_memory()
            sizes = f"an example, {spell(needed)}, must fit into {spell(memory)} of memory"
            check(needed <= memory, "sequence_length", self.sequence_length, sizes)
            # generate one example, so that an invalid parameter fails here and not during a run
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
