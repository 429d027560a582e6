"""The sizes of an engine."""

import dataclasses

from layers.config import check, check_types
from layers.decoder import DecoderConfig
from layers.state import CacheConfig

RECURRENT = ("mamba", "mamba2", "rwkv4", "rwkv7")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The sizes of an engine: they decide its memory and its compiled programs.

    ``slots``: sequences that are decoded together. ``max_length``: tokens of a sequence, prompt and
    new ones together. ``chunk``: prompt tokens that are computed in one step (chunked prefill,
    Agrawal 2024, 2403.02310, §4). ``cache``: how keys and values are stored. ``queue``: the most
    requests that wait, None for no limit. ``prefix``: prompts share the memory of equal beginnings,
    in whole chunks; ``snapshots``: the most bytes of recurrent states that are kept for it.
    """

    slots: int = 8
    max_length: int = 2048
    chunk: int = 256
    cache: CacheConfig = CacheConfig()
    queue: int | None = None
    prefix: bool = False
    snapshots: int = 1 << 28

    def __post_init__(self):
        check_types(self)
        for name in ("slots", "max_length", "chunk"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        fits = self.chunk <= self.max_length
        check(fits, "chunk", self.chunk, f"must be at most max_length={self.max_length}")
        check(self.queue is None or self.queue > 0, "queue", self.queue, "must be > 0 or None")
        check(self.snapshots >= 0, "snapshots", self.snapshots, "must be ≥ 0")
        read = self.prefix or self.snapshots == EngineConfig.snapshots
        check(read, "snapshots", self.snapshots, "changes nothing: requires prefix=True")
        if self.cache.kind == "paged":
            divides = self.chunk % self.cache.page == 0
            check(divides, "cache.page", self.cache.page, f"must divide chunk={self.chunk}")

    @property
    def pages_per_slot(self) -> int:
        """The number of pages of the longest sequence."""
        return -(-self.max_length // self.cache.page)

    @property
    def pages(self) -> int:
        """The number of pages of the pool."""
        return self.cache.pages or self.slots * self.pages_per_slot

    def check_model(self, model: DecoderConfig) -> None:
        """Raise `ConfigError` if an engine of this configuration cannot serve ``model``."""
        outputs = model.outputs
        check(outputs is None, "model.outputs", outputs, "an engine requires a language model")
        if model.position == "learned":
            limit = model.max_length
            fits = limit is None or self.max_length <= limit
            check(fits, "max_length", self.max_length, f"must be at most the model's {limit}")
        if self.prefix:
            has_keys = any(kind not in RECURRENT for kind in model.pattern)
            shared = self.cache.kind == "paged" or not has_keys
            check(shared, "prefix", True,
                  f"requires cache.kind='paged': layers of {', '.join(model.pattern)}")  # fmt: skip
