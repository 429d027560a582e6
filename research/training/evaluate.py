"""Held-out loss and accuracy."""

import itertools

import jax
import numpy as np
from jax.sharding import Mesh

from layers.config import check
from layers.decoder import Decoder
from research.data import DataConfig, make_dataset
from research.parallel import MeshConfig, make_mesh, shard_batch, time_order, use_mesh
from research.training.step import LossFn, make_eval_step, next_token_loss, report, scalars


def evaluate(
    model: Decoder,
    data: DataConfig,
    *,
    batches: int,
    mesh: Mesh | None = None,
    loss_fn: LossFn = next_token_loss,
) -> dict[str, float]:
    """Means over the first ``batches`` batches of the held-out split, the same ones every time.

    Returns ``loss`` in nats a token, ``accuracy``, and whatever else is a number in the `report` of
    what ``loss_fn`` sums.

    Raises:
      ConfigError: ``batches`` < 1, or a held-out split without labels.
    """
    check(batches > 0, "batches", batches, "must be > 0")
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    step = make_eval_step(loss_fn)
    dataset = make_dataset(
        data,
        split="validation",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    totals: dict[str, np.ndarray] = {}
    order = time_order(model.config, mesh, data.sequence_length)
    with use_mesh(mesh):
        pending = [
            step(model, shard_batch(batch, mesh, order))
            for batch in itertools.islice(dataset, batches)
        ]
    for sums in pending:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    something = float(totals.get("weight", 0.0)) > 0
    check(something, "data", data.source, "its held-out split has nothing to predict")
    return scalars(report(totals))
