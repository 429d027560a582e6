"""`Context`: what a layer is given besides its input, and returns besides its output."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.hooks import Layer, Tap
from pallas_kernels.mask import CAUSAL, Mask


@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer is given besides its input: ``y_btd, context = layer(x_btd, context)``.

    ``mask``: who sees whom among these tokens; its positions of −1 are padding. ``positions``:
    those of rotary embeddings, default the mask's positions (multimodal models have others).
    ``state``: what this layer remembers of earlier tokens; None if there are none. ``key``: for
    random numbers in training; None: nothing is random. ``layer``: its index in the stack, which
    may be traced. ``shared``: name → an array that a layer passes to later layers; what only one
    model family requires is here. A layer returns the context with its new ``state``, its changes
    of ``shared``, and its ``report`` (`layers.moe.RouterStats` of a mixture of experts).
    """

    mask: Mask = CAUSAL
    positions: Any = None
    state: Any = None
    tap: Tap = dataclasses.field(default_factory=Tap)
    key: jax.Array | None = None
    layer: Layer = 0
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report: Any = None

    @classmethod
    def of_tokens(cls, positions_bt=None, segments_bt=None, until_bt=None, **fields) -> "Context":
        """The context of tokens that see one another; ``fields`` are its other fields."""
        return cls(mask=Mask.of_tokens(positions_bt, segments_bt, until_bt), **fields)

    def rotary_positions(self, time: int) -> jax.Array:
        """``positions``, default those of the mask, default ``0 … time − 1``."""
        positions = self.mask.q_positions_bt if self.positions is None else self.positions
        return jnp.arange(time, dtype=jnp.int32)[None] if positions is None else positions

    def replace(self, **changes: Any) -> "Context":
        """This context with some fields changed."""
        return dataclasses.replace(self, **changes)
