"""Multi-head attention converted to grouped-query: GQA (Ainslie 2023, arXiv:2305.13245), §2.1."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check, check_choice
from layers.decoder import Decoder

METHODS = ("mean", "first", "random")


def group_kv_heads(
    model: Decoder, num_kv_heads: int, method: str = "mean", *, key: jax.Array | None = None
) -> Decoder:
    """``model`` with ``num_kv_heads`` key and value heads, computed from those it has.

    Args:
      method: ``mean`` averages the heads of a group, ``first`` takes the first of them, ``random``
        initialises the projections again, which requires ``key`` (Figure 4 compares the three).

    Raises:
      ConfigError: ``num_kv_heads`` does not divide the model's, an unknown method, or ``random``
        without a key.
    """
    attention = model.config.part("attention")
    kv_heads = attention.kv_heads
    check(
        0 < num_kv_heads <= kv_heads and kv_heads % num_kv_heads == 0,
        "num_kv_heads",
        num_kv_heads,
        f"must divide the model's {kv_heads}",
    )
    check_choice("method", method, METHODS)
    check(method != "random" or key is not None, "key", key, "is required by method='random'")
    config = dataclasses.replace(
        model.config, attention=dataclasses.replace(attention, num_kv_heads=num_kv_heads)
    )

    # The tree and its metadata come from a model of the new shapes, the arrays from the old model.
    def make() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0 if key is None else key))

    target = make() if method == "random" else jax.eval_shape(make)

    def convert(path, leaf, fresh):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/mixer/key/" not in name and "/mixer/value/" not in name:
            return leaf
        if method == "random":
            return fresh
        # weights [l, d, k, c] and biases [l, k, c]: heads are the second to last dimension
        groups = leaf.reshape(
            *leaf.shape[:-2], num_kv_heads, kv_heads // num_kv_heads, leaf.shape[-1]
        )
        if method == "first":
            return groups[..., 0, :]
        return jnp.mean(groups.astype(jnp.float32), axis=-2).astype(leaf.dtype)

    old = jax.tree_util.tree_flatten_with_path(model)[0]
    leaves = [
        convert(path, leaf, fresh)
        for (path, leaf), fresh in zip(old, jax.tree.leaves(target), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)
