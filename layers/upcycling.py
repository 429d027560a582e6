"""A dense checkpoint as a mixture of experts: sparse upcycling (Komatsuzaki 2022, 2212.05055)."""

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
    """``model`` with copies of its MLPs as experts, and fresh routers (§3).

    With weights that sum to 1 (``moe.normalize``, or ``router="choice_softmax"``) and no capacity,
    the result computes what ``model`` does.

    Args:
      moe: its experts must be as the model's MLPs are: same width and activation, no biases.
      feed_forward: one name a layer of a new pattern, repeated: ``("mlp", "moe")`` is every other
        layer.
      key: of the routers.

    Raises:
      ConfigError: experts of another shape, or a pattern that does not fit the model's.
    """
    old = model.config
    mlp = old.part("mlp")
    check(set(old.feed_forward) == {"mlp"}, "feed_forward", old.feed_forward, "must be all mlp")
    check(moe.width == mlp.width, "moe.width", moe.width, f"must be the MLPs' {mlp.width}")
    same = moe.activation == mlp.activation
    check(same, "moe.activation", moe.activation, f"must be the MLPs' {mlp.activation}")
    check(not mlp.bias, "mlp.bias", mlp.bias, "experts have none")
    shared = moe.shared_experts
    check(shared == 0, "moe.shared_experts", shared, "must be 0: every expert is a copy")
    only = set(feed_forward) <= {"mlp", "moe"} and "moe" in feed_forward
    check(only, "feed_forward", feed_forward, "must name moe, and mlp where the MLP stays")
    period = math.lcm(len(old.pattern), len(feed_forward))
    config = dataclasses.replace(
        old,
        moe=moe,
        pattern=old.pattern * (period // len(old.pattern)),
        feed_forward=feed_forward * (period // len(feed_forward)),
    )
    fresh = Decoder(config, rngs=nnx.Rngs(key))

    have = flat(model)

    def convert(name: str, new: jax.Array) -> jax.Array:
        if not name.startswith("blocks/"):
            return have[name]
        _, position, part = name.split("/", 2)
        layers = range(old.num_layers)
        places = [old.locate(i) for i in layers if config.locate(i)[0] == int(position)]

        def rows(part):
            found = [have[f"blocks/{block}/{part}"] for block, _ in places]
            found = [
                a if row is None else a[row] for a, (_, row) in zip(found, places, strict=True)
            ]
            return jnp.stack(found) if config.scan else found[0]

        if feed_forward[int(position) % len(feed_forward)] == "mlp" or not part.startswith("mlp/"):
            return rows(part)
        if part in ("mlp/gate", "mlp/up", "mlp/down"):
            return jnp.broadcast_to(jnp.expand_dims(rows(part + "/weight"), -3), new.shape)
        return new

    leaves = [convert(name, new) for name, new in flat(fresh).items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)
