"""Conversion of a decoder's layers between stacks, which are scanned, and an unrolled list.

Optimiser moments and gradients are trees of the same modules, so they are converted too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.decoder import Decoder, row


def rearranged(tree: Any, *, scan: bool, circuits: int = 1) -> Any:
    """``tree`` with the layers of every `Decoder` in it stacked or unstacked.

    ``scan``, ``circuits``: as in `layers.architecture.DecoderConfig`. Arrays are copied once.
    """
    return jax.tree.map(
        lambda node: _decoder(node, scan, circuits) if isinstance(node, Decoder) else node,
        tree,
        is_leaf=lambda node: isinstance(node, Decoder),
    )


def unstacked(model: Decoder) -> Decoder:
    """``model`` with its layers as a list, so that decoding copies nothing."""
    return rearranged(model, scan=False)


def _decoder(model: Decoder, scan: bool, circuits: int) -> Decoder:
    old = model.config
    config = dataclasses.replace(old, scan=scan, circuits=circuits)
    if (old.scan, old.circuits) == (scan, circuits):
        return model

    def layer(i: int) -> Any:
        block, index = old.locate(i)
        return model.blocks[block] if index is None else row(model.blocks[block], index)

    layers = [layer(i) for i in range(config.num_layers)]
    blocks = layers
    if scan:
        locations = [config.locate(i) for i in range(config.num_layers)]
        blocks = [
            jax.tree.map(
                lambda *a: jnp.stack(a),
                *(a_layer for a_layer, (b, _) in zip(layers, locations, strict=True) if b == block),
            )
            for block in range(len(config.pattern) * circuits)
        ]
    new = jax.tree.map(lambda a: a, model)  # a new module with the same arrays
    new.config, new.blocks = config, nnx.List(blocks)
    return new
