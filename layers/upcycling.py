"""Sparse upcycling: a mixture of experts from a dense checkpoint (Komatsuzaki 2022, 2212.05055)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check
from layers.decoder import Decoder
from layers.routing import MoeConfig
from layers.weights import flat


def upcycle(
    model: Decoder, moe: MoeConfig, feed_forward: tuple[str, ...] = ("moe",), *, key: jax.Array
) -> Decoder:
    """``model`` with copies of its MLPs as experts, and newly initialised routers (§3).

    With weights that sum to 1 (``moe.normalize``, or ``router="choice_softmax"``) and no capacity,
    the result computes the same function as ``model``.

    Args:
      moe: its experts must have the width and activation of the model's MLPs, and no biases.
      feed_forward: one name for each layer of a new pattern: with ``("mlp", "moe")`` every second
        layer becomes a mixture.
      key: for the routers.

    Raises:
      ConfigError: experts of another shape, or a pattern that is not possible with the model's.
    """
    old = model.config
    mlp = old.part("mlp")
    check(set(old.feed_forward) == {"mlp"}, "feed_forward", old.feed_forward, "must be all mlp")
    check(moe.width == mlp.width, "moe.width", moe.width, f"must be mlp.width={mlp.width}")
    equal = moe.activation == mlp.activation
    check(equal, "moe.activation", moe.activation, f"must be mlp.activation={mlp.activation!r}")
    check(not mlp.bias, "mlp.bias", mlp.bias, "must be False: experts have no bias")
    shared = moe.shared_experts
    check(shared == 0, "moe.shared_experts", shared, "must be 0: every expert is a copy")
    named = set(feed_forward) <= {"mlp", "moe"} and "moe" in feed_forward
    check(named, "feed_forward", feed_forward, "must name 'moe', and 'mlp' for MLPs that stay")
    period = math.lcm(len(old.pattern), len(feed_forward))
    config = dataclasses.replace(
        old,
        moe=moe,
        pattern=old.pattern * (period // len(old.pattern)),
        feed_forward=feed_forward * (period // len(feed_forward)),
    )
    fresh = Decoder(config, rngs=nnx.Rngs(key))

    arrays = flat(model)

    def convert(name: str, new: jax.Array) -> jax.Array:
        if not name.startswith("blocks/"):
            return arrays[name]
        _, position, part = name.split("/", 2)
        layers = range(old.num_layers)
        locations = [old.locate(i) for i in layers if config.locate(i)[0] == int(position)]

        def rows(part):
            stacked = [arrays[f"blocks/{block}/{part}"] for block, _ in locations]
            stacked = [
                a if row is None else a[row] for a, (_, row) in zip(stacked, locations, strict=True)
            ]
            return jnp.stack(stacked) if config.scan else stacked[0]

        if feed_forward[int(position) % len(feed_forward)] == "mlp" or not part.startswith("mlp/"):
            return rows(part)
        if part in ("mlp/gate", "mlp/up", "mlp/down"):
            return jnp.broadcast_to(jnp.expand_dims(rows(part + "/weight"), -3), new.shape)
        return new

    leaves = [convert(name, new) for name, new in flat(fresh).items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)
