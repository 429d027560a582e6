"""Losses and metrics of mixtures of experts in training.

The balance loss is computed over the rows of one forward pass. With gradient accumulation these are
the rows of a micro-batch, whose shares of tokens per expert vary more than those of the batch. So
its gradient is not that of the balance loss over the batch, which would require a second forward
pass for the shares. The name of the metric says which loss it is: ``router_balance``, or
``router_balance_per_microbatch``.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.moe import RouterStats, load_entropy

CHOICES = "router_choices"
_COUNTS = (CHOICES, "router_asked", "router_dropped")


def router_loss(stats: RouterStats, weight: jax.Array) -> jax.Array:
    """The sum of the mixtures' losses, which are means, times ``weight``."""
    return weight * jnp.sum(stats.loss)


def router_sums(stats: RouterStats, weight: jax.Array) -> dict[str, jax.Array]:
    """The sums that `router_metrics` takes: losses times ``weight``, choices ``[layers, e]``."""
    return {
        "router_balance": weight * jnp.mean(stats.balance),
        "router_z": weight * jnp.mean(stats.z),
        CHOICES: stats.counts_e,
        "router_asked": jnp.sum(stats.asked),
        "router_dropped": jnp.sum(stats.dropped),
    }


def router_metrics(sums: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of `router_sums`, and the other ``sums``.

    ``router_choices``: tokens that chose each expert, ``[layers, e]``; ``router_entropy``: their
    entropy (1 is uniform); ``router_drop_rate``: the share of choices that were dropped.
    ``router_balance`` and ``router_z`` (means over layers) are among the other sums: they are
    divided by the denominator.
    """
    others = {name: value for name, value in sums.items() if name not in _COUNTS}
    if CHOICES not in sums:
        return {}, others
    choices, asked, dropped = (sums[name] for name in _COUNTS)
    metrics = {
        CHOICES: choices,
        "router_entropy": load_entropy(choices),
        "router_drop_rate": dropped / jnp.maximum(asked, 1),
    }
    return metrics, others


def named_by_scope(metrics: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """``metrics`` of a step of ``parts`` micro-batches, with the name for their balance loss."""
    if parts == 1:
        return dict(metrics)
    return {
        "router_balance_per_microbatch" if name == "router_balance" else name: value
        for name, value in metrics.items()
    }
