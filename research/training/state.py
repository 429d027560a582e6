"""Everything a run must remember, as one pytree."""

import dataclasses
from typing import Any

import jax

from layers.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimiser moments, step and random key; the data iterator is saved beside it."""

    model: Decoder
    optimizer: Any
    step: jax.Array  # int32, steps done
    key: jax.Array
