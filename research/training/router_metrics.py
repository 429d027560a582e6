"""Losses and metrics of mixtures of experts in training.

The balance loss is of the rows that a forward pass sees together: with accumulation, of a
micro-batch, whose shares of tokens scatter more than the whole batch's do. So its gradient is not
the whole batch's (that would take a second forward pass, for the shares alone), and the metric says
which it is: ``router_balance``, or ``router_balance_per_microbatch``.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.moe import RouterStats, load_entropy

CHOICES = "router_choices"
_COUNTS = (CHOICES, "router_asked", "router_dropped")


def router_loss(stats: RouterStats, weight: jax.Array) -> jax.Array:
    """The mixtures' own losses, which are means, as a part of a sum over ``weight``."""
    return weight * jnp.sum(stats.loss)


def router_sums(stats: RouterStats, weight: jax.Array) -> dict[str, jax.Array]:
    """What `router_metrics` takes: losses times ``weight``, choices ``[layers, e]``."""
    return {
        "router_balance": weight * jnp.mean(stats.balance),
        "router_z": weight * jnp.mean(stats.z),
        CHOICES: stats.counts_e,
        "router_asked": jnp.sum(stats.asked),
        "router_dropped": jnp.sum(stats.dropped),
    }


def router_metrics(sums: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of `router_sums`, and the other ``sums``.

    ``router_choices``: tokens that chose each expert, ``[layers, e]``; ``router_entropy`` of them
    (1 is even); ``router_drop_rate``: the share of choices that no expert took. ``router_balance``
    and ``router_z`` (means over layers) stay among the others: they are over the denominator.
    """
    others = {name: value for name, value in sums.items() if name not in _COUNTS}
    if CHOICES not in sums:
        return {}, others
    choices, asked, dropped = (sums[name] for name in _COUNTS)
    found = {
        CHOICES: choices,
        "router_entropy": load_entropy(choices),
        "router_drop_rate": dropped / jnp.maximum(asked, 1),
    }
    return found, others


def named_by_scope(metrics: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """``metrics`` of a step of ``parts`` micro-batches, whose balance loss says of what it is."""
    if parts == 1:
        return dict(metrics)
    return {
        "router_balance_per_microbatch" if name == "router_balance" else name: value
        for name, value in metrics.items()
    }
