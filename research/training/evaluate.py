"""Metrics of a model on held-out data."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from layers.config import check
from layers.decoder import Decoder
from research.data import DataConfig, vocabulary_size
from research.parallel import MeshConfig, make_mesh, shard_batch, use_mesh
from research.training.check import check_vocabulary
from research.training.objectives import NextToken, Objective
from research.training.source import Source, check_held_out, held_out
from research.training.step import make_eval_step, scalars


def evaluate(
    model: Any,
    data: DataConfig | Source,
    *,
    batches: int,
    mesh: Mesh | None = None,
    objective: Objective = NextToken(),  # noqa: B008
    frozen: Any = None,
) -> dict[str, float]:
    """Metrics of ``objective`` over the first ``batches`` held-out batches, the same at every call.

    For the next token: ``loss`` in nats per token, ``accuracy``, and the metrics of mixtures of
    experts.

    Raises:
      ConfigError: ``batches`` < 1, a source without held-out batches, held-out batches without a
        label, or data with more ids than ``model`` has.
    """
    check(batches > 0, "batches", batches, "must be > 0")
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    step = make_eval_step(objective)
    if isinstance(data, DataConfig):
        if isinstance(model, Decoder):
            check_vocabulary(model.config, vocabulary_size(data))
        name, held_out_batches = data.source, held_out(data, batches)
    else:
        check_held_out(data, "batches", batches)
        name, held_out_batches = data.name, data.held_out(batches)  # type: ignore[attr-defined]
    total: Any = 0.0
    totals: dict[str, Any] = {}
    config = getattr(model, "config", None)
    with use_mesh(mesh):
        pending = [
            step(model, shard_batch(batch, mesh, config), frozen) for batch in held_out_batches
        ]
    for denominator, sums in pending:
        total = total + np.asarray(denominator, np.float64)
        for metric, value in sums.items():
            totals[metric] = totals.get(metric, 0.0) + np.asarray(value, np.float64)
    check(float(total) > 0, "data", name, "its held-out split has no labels")
    return scalars(objective.metrics(totals, total))
