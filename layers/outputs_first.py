"""Weights with their outputs first in memory, for products with few rows on a CPU.

XLA:CPU copies the right factor of a product into blocks in each call. For ``x W`` in a decoding
step, that is the weight; for ``Wᵀ xᵀ``, it is the few rows of ``x``, and the weight is read once.
The dimensions of its left factor that are summed must be the last ones in memory. So the weights
are transposed once, before the first token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.decoder import Decoder
from layers.embedding import Embedding
from layers.latent_attention import LatentAttention
from layers.linear import Linear
from layers.sharding import Axes, spec
from layers.stack import unstacked
from layers.weights import Leaf


def for_decoding(model: Decoder) -> Decoder:
    """``model`` as its decoding steps are fastest: `unstacked`, on one CPU also `outputs_first`.

    The new model has copies of the weights that it changes; of its own result it changes none.
    """
    one_device = spec() is None
    change = outputs_first if one_device and jax.default_backend() == "cpu" else _same
    return change(unstacked(model))


def outputs_first(model: Decoder) -> Decoder:
    """``model``, unstacked, with `OutputsFirst` for the arrays of linear maps and embeddings.

    Weights of experts stay, which have a dimension for the expert, and those of latent attention
    that it multiplies in another order (`layers.latent_attention`).
    """
    kinds = Linear | Embedding | LatentAttention

    def change(node: Any) -> Any:
        if not isinstance(node, kinds):
            return node
        new = jax.tree.map(change, node, is_leaf=lambda n: n is not node and isinstance(n, kinds))
        if isinstance(node, LatentAttention):
            new.key, new.value = node.key, node.value
        elif isinstance(node, Linear):
            new.weight = _outputs_first(node.weight)
        else:
            new.table = _outputs_first(node.table)
        return new

    return jax.tree.map(change, model, is_leaf=lambda n: isinstance(n, kinds))


def _outputs_first(param: Any) -> Any:
    metadata, array = param.get_metadata(), param.get_value()
    if isinstance(array, Leaf):
        return param
    role, axes = metadata["role"], metadata["axes"]
    outputs, inputs = role.outputs, role.inputs
    if role.name == "embedding":  # its product is that of logits, from channels to tokens
        outputs, inputs = inputs, outputs
    order = (*outputs, *inputs)
    if len(order) < array.ndim:  # a map for each index of another dimension
        return param
    return param.replace(OutputsFirst(jnp.transpose(array, order), axes, order))


def _same(model: Decoder) -> Decoder:
    return model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst(Leaf):
    """A weight, on one device, whose dimensions are stored in the order ``order``: outputs first.

    ``axes``: those of the weight, in its own order.
    """

    array: jax.Array
    axes: Axes = dataclasses.field(metadata=dict(static=True))
    order: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))

    def parts(self):
        return {"array": tuple(self.axes[i] for i in self.order)}

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        back = [self.order.index(i) for i in range(len(self.order))]
        return jnp.transpose(self.array, back).astype(dtype)

    def einsum(
        self, subscripts: str, x: jax.Array, *, dtype: jnp.dtype, out_axes: Axes, out_dtype: Any
    ) -> jax.Array:
        inputs, output = subscripts.split("->")
        of_x, of_weight = inputs.split(",")
        stored = "".join(of_weight[i] for i in self.order)
        summed = [letter for letter in stored if letter not in output]
        where = [stored.index(letter) for letter in summed], [of_x.index(a) for a in summed]
        # not einsum, which may change the order of the factors
        y = jax.lax.dot_general(
            self.array.astype(dtype),
            x.astype(dtype),
            (where, ((), ())),
            preferred_element_type=out_dtype,
        )
        letters = [letter for letter in stored + of_x if letter not in summed]
        return jnp.transpose(y, [letters.index(letter) for letter in output])
