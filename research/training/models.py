"""The model that is trained: a `Decoder`, or any `nnx.Module` that a configuration builds."""

from typing import Any, Protocol, runtime_checkable

from flax import nnx

from layers.config import check
from layers.decoder import Decoder, DecoderConfig


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass that builds a module; its fields are written to the run's config.json.

    The module's parameters are `nnx.Param` with ``axes`` metadata, as in all layers.
    """

    def build(self, rngs: nnx.Rngs) -> nnx.Module: ...


def build(config: DecoderConfig | ModelConfig, rngs: nnx.Rngs) -> Any:
    """The module of ``config`` with its initial values."""
    if isinstance(config, DecoderConfig):
        return Decoder(config, rngs=rngs)
    is_config = isinstance(config, ModelConfig)
    check(is_config, "model", type(config).__name__, "must be a DecoderConfig or have build(rngs)")
    return config.build(rngs)
