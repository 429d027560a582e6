"""A multi-head checkpoint as a grouped-query one: GQA (Ainslie 2023, arXiv:2305.13245), §2.1."""

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
    """``model`` with ``num_kv_heads`` key and value heads made from those it has.

    Args:
      method: ``mean`` pools the heads of a group, ``first`` keeps its first, ``random``
        initialises the projections anew, which needs ``key`` (Figure 4 compares the three).

    Raises:
      ConfigError: the heads do not divide, an unknown method, or ``random`` without a key.
    """
    attention = model.config.part("attention")
    have = attention.kv_heads
    check(
        0 < num_kv_heads <= have and have % num_kv_heads == 0,
        "num_kv_heads",
        num_kv_heads,
        f"must divide the model's {have}",
    )
    check_choice("method", method, METHODS)
    check(method != "random" or key is not None, "key", key, "method='random' needs one")
    config = dataclasses.replace(
        model.config, attention=dataclasses.replace(attention, num_kv_heads=num_kv_heads)
    )

    # The tree and its metadata come from a model of the new shape, the numbers from the old one.
    def new() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0 if key is None else key))

    target = new() if method == "random" else jax.eval_shape(new)

    def convert(path, leaf, fresh):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/mixer/key/" not in name and "/mixer/value/" not in name:
            return leaf
        if method == "random":
            return fresh
        # weights [l, d, k, c] and biases [l, k, c]: heads are last but one
        groups = leaf.reshape(*leaf.shape[:-2], num_kv_heads, have // num_kv_heads, leaf.shape[-1])
        if method == "first":
            return groups[..., 0, :]
        return jnp.mean(groups.astype(jnp.float32), axis=-2).astype(leaf.dtype)

    old = jax.tree_util.tree_flatten_with_path(model)[0]
    leaves = [
        convert(path, leaf, fresh)
        for (path, leaf), fresh in zip(old, jax.tree.leaves(target), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)
