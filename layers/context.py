"""What a layer of the stack is handed beside its input, and what it hands back with its output."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.hooks import Layer, Tap
from pallas_kernels.mask import CAUSAL, Mask


@dataclasses.dataclass(frozen=True)
class Context:
    """Every layer is called as ``y_btd, context = layer(x_btd, context)``.

    ``mask``: who sees whom among these tokens; its positions of −1 are padding. ``positions``: what
    rotations turn by, default the mask's positions (multimodal models rotate by others).
    ``state``: what this layer remembers of the tokens before; None if there are none.
    ``key``: of what is random in training; None: nothing is. ``layer``: its number in the stack,
    which may be traced. ``shared``: what layers hand to later ones, by name; one family's special
    needs go here. A layer returns the context with its new ``state``, what it changed of
    ``shared``, and its ``report`` (a mixture's `layers.moe.RouterStats`).
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
    def of_tokens(cls, positions_bt=None, segments_bt=None, until_bt=None, **rest) -> "Context":
        """The context of tokens that see one another."""
        return cls(mask=Mask.of_tokens(positions_bt, segments_bt, until_bt), **rest)

    def rotary_positions(self, time: int) -> jax.Array:
        """``positions``, or those of the mask, of ``time`` tokens."""
        given = self.mask.q_positions_bt if self.positions is None else self.positions
        return jnp.arange(time, dtype=jnp.int32)[None] if given is None else given

    def replace(self, **changes: Any) -> "Context":
        """This context with some fields changed."""
        return dataclasses.replace(self, **changes)
