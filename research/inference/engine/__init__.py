"""The inference engine: continuous batching of many requests over paged or contiguous caches."""

from research.inference.engine.config import EngineConfig
from research.inference.engine.engine import Engine
from research.inference.engine.request import Event, QueueFull, Request, Result, Sample
from research.inference.engine.speculation import Speculative

__all__ = [
    "Engine",
    "EngineConfig",
    "Event",
    "QueueFull",
    "Request",
    "Result",
    "Sample",
    "Speculative",
]
