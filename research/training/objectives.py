"""Objectives: the sum over a batch that training minimises, and its denominator.

An objective is a frozen dataclass: equal objectives share a compiled step. The loop, gradient
accumulation, ZeRO, resume and metrics are the same for all objectives.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from layers.config import check, check_types
from research.training.router_metrics import router_loss, router_metrics, router_sums

Batch = Mapping[str, jax.Array]


class Sums(NamedTuple):
    """The sums of an objective over a batch or micro-batch.

    ``total``: the sum to minimise. ``denominator``: what the total is divided by, once for all
    micro-batches of a batch: labelled tokens, sequences, pairs. ``reported``: further sums, by
    name.
    """

    total: jax.Array
    denominator: jax.Array
    reported: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Maps a model and a batch to `Sums`; subclasses add fields.

    ``rows_together``: the number of consecutive rows that belong together (2 for preference pairs);
    they are always in the same micro-batch.
    """

    rows_together: ClassVar[int] = 1

    def __call__(
        self, model: Any, batch: Batch, key: jax.Array | None = None, frozen: Any = None
    ) -> Sums:
        """The sums over ``batch``.

        Args:
          model: the model that is trained.
          batch: arrays whose first axis is rows.
          key: random key in training; None in evaluation.
          frozen: trees that are read and not trained: a reference policy, a reward model, a
            teacher. They are an argument of the compiled step, never a constant.
        """
        raise NotImplementedError

    def metrics(self, reported: Mapping[str, Any], denominator: Any) -> dict[str, Any]:
        """Metrics from sums over any number of batches: by default each over the denominator."""
        return {name: value / denominator for name, value in reported.items()}


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy in nats per labelled token, plus ``z_loss · log²Z`` (PaLM, 2204.02311, §5).

    Reports ``loss`` (cross-entropy alone), ``accuracy`` and ``z_loss``. For models with mixtures of
    experts it also minimises their losses and reports `router_metrics`. A batch has the arrays
    ``tokens, targets, positions, segment_ids`` and ``weights`` of labels, ``[b, t]`` each.
    """

    z_loss: float = 0.0

    def __post_init__(self):
        check_types(self)
        check(self.z_loss >= 0, "z_loss", self.z_loss, "must be ≥ 0")

    def __call__(self, model, batch, key=None, frozen=None) -> Sums:
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"], key=key)
        weights_bt = batch["weights"]
        nats_bt, norm_bt = cross_entropy(output.logits_btv, batch["targets"])
        right_bt = jnp.argmax(output.logits_btv, axis=-1) == batch["targets"]
        sums = {
            "loss": jnp.sum(nats_bt * weights_bt),
            "accuracy": jnp.sum(right_bt * weights_bt),
            "z_loss": jnp.sum(jnp.square(norm_bt) * weights_bt),
        }
        total = sums["loss"] + self.z_loss * sums["z_loss"]
        tokens = jnp.sum(weights_bt)
        if output.aux is not None:
            total = total + router_loss(output.aux, tokens)
            sums |= router_sums(output.aux, tokens)
        return Sums(total, tokens, sums)

    def metrics(self, reported, denominator):
        routed, plain = router_metrics(reported)
        return super().metrics(plain, denominator) | routed


def cross_entropy(logits_btv: jax.Array, targets_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(−log softmax(logits)[target], log Σ exp(logits))``, float32 ``[b, t]`` each."""
    logits_btv = logits_btv.astype(jnp.float32)
    norm_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A masked sum instead of a gather, because the vocabulary may be sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])
    return norm_bt - jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1), norm_bt
