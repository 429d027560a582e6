"""Whether the parts of a run fit one another and the devices: the same check for runs and plans."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from layers.architecture import OFFLOADED
from layers.config import ConfigError, check
from layers.decoder import DecoderConfig
from layers.weights import flat
from research.memory import check_memory, shard_bytes
from research.parallel import MeshConfig, abstract_batch, batch_ways, shardings, validate
from research.parallel.rules import with_shardings
from research.parallel.zero import check_stage
from research.training import trainable
from research.training.config import TrainingConfig
from research.training.models import ModelConfig, build
from research.training.objectives import Objective
from research.training.offload import check_host
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state

HALF = "training does not support it, because gradients underflow: use bfloat16"


def check_run(
    model: DecoderConfig | ModelConfig,
    training: TrainingConfig,
    strategy: MeshConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    sequence_length: int | None = None,
    vocabulary: int | None = None,
    objective: Objective | None = None,
    patterns: Sequence[str] = trainable.ALL,
) -> None:
    """Check that a run can train on ``mesh``, which may consist of devices that do not exist.

    Args:
      strategy: the configuration that ``mesh`` was made from.
      batch_size, sequence_length, vocabulary: of the data; None if they are not known in advance.
      patterns: of the trained parameters, see `research.training.trainable`.

    Raises:
      ConfigError: sizes that do not divide, do not fit one another or do not fit the memory, a
        field that changes nothing, or an optimiser that ``mesh`` or ``strategy`` does not support.
    """
    ways = batch_ways(mesh)
    check_stage(strategy.zero, model, dict(mesh.shape))
    check_host(model, strategy, mesh)
    if isinstance(model, DecoderConfig):
        _check_decoder(model, training, mesh, batch_size, sequence_length, vocabulary)
    else:
        stages = mesh.shape["stage"]
        check(stages == 1, "mesh.stage", stages, "must be 1: only decoders support stages")
        divides = f"must be a multiple of mesh.stage×data×fsdp×expert={ways}"
        check(batch_size % ways == 0, "batch_size", batch_size, divides)
    # each process loads complete rows, so only axes that shard rows can go across processes
    processes = len({device.process_index for device in mesh.devices.flat})
    check(
        ways % processes == 0,
        "mesh.stage×data×fsdp×expert",
        ways,
        f"must be a multiple of the {processes} processes",
    )
    microbatches, device_rows = training.gradient_accumulation, batch_size // ways
    rows_together = 1 if objective is None else objective.rows_together
    check(
        device_rows % rows_together == 0,
        "batch_size",
        batch_size,
        f"the {device_rows} rows of a device must be a multiple of {rows_together}, the rows that "
        "belong together",
    )
    check(
        device_rows // rows_together % microbatches == 0,
        "training.gradient_accumulation",
        microbatches,
        f"must divide the {device_rows // rows_together} "
        f"{'rows' if rows_together == 1 else 'groups'} of a device",
    )
    if tuple(patterns) != trainable.ALL:
        trainable.check_patterns(jax.eval_shape(lambda: build(model, nnx.Rngs(0))), patterns)
    abstract = _check_state(model, training, strategy, mesh, patterns)
    if isinstance(model, DecoderConfig) and sequence_length is not None:
        every = tuple(patterns) == trainable.ALL
        _check_batch(model, mesh, batch_size, sequence_length, microbatches, every)
    trained = flat(trainable.split(abstract, patterns)[0])
    for path, array in trained.items():
        check(array.dtype != jnp.float16, f"model: {path}", "float16", HALF)
    check(
        training.optimizer.master or any(array.dtype.itemsize < 4 for array in trained.values()),
        "training.optimizer.master",
        False,
        "changes nothing: the trained parameters are float32",
    )


def check_vocabulary(model: DecoderConfig, vocabulary: int) -> None:
    """Raise `ConfigError` if ids below ``vocabulary`` (see `vocabulary_size`) have no logit."""
    check(
        vocabulary <= model.vocab_size,
        "model.vocab_size",
        model.vocab_size,
        f"must be at least the vocabulary of the data, {vocabulary}",
    )


def _check_decoder(
    model: DecoderConfig,
    training: TrainingConfig,
    mesh: Mesh,
    batch_size: int,
    sequence_length: int | None,
    vocabulary: int | None,
) -> None:
    # if the length is not known in advance, any length that the mesh divides
    length = 2 * mesh.shape["sequence"] if sequence_length is None else sequence_length
    validate(model, mesh, batch_size=batch_size, sequence_length=length)
    if vocabulary is not None:
        check_vocabulary(model, vocabulary)
    limit = model.max_length if model.position == "learned" else None
    check(
        limit is None or sequence_length is None or sequence_length <= limit,
        "data.sequence_length",
        sequence_length,
        f"must be at most model.max_length={limit}",
    )
    for name in ("dtype", "param_dtype"):
        dtype = getattr(model, name)
        check(dtype != "float16", f"model.{name}", dtype, HALF)


def _check_state(
    model: Any,
    training: TrainingConfig,
    strategy: MeshConfig,
    mesh: Mesh,
    patterns: Sequence[str],
) -> Any:
    """Check that mesh and stage shard the moments, and that all fits the memory of the devices.

    Returns:
      The abstract module; its layers may be stacked where those of ``model`` are not.
    """
    optimizer = make_optimizer(training.optimizer, training.steps, offload=strategy.offload)

    def abstract(model: Any) -> Any:
        return abstract_state(
            model, optimizer, mesh, strategy.zero_stage, patterns=patterns, offload=strategy.offload
        )

    counted, state = model, None
    if isinstance(model, DecoderConfig) and tuple(patterns) == trainable.ALL:
        # stacked layers have the same bytes, and any number of them is counted at once
        with contextlib.suppress(ConfigError):  # this model does not support it
            counted = dataclasses.replace(model, scan=True)
            state = abstract(counted)
    if state is None:
        counted, state = model, abstract(model)
    needed = shard_bytes(state)
    summed, clipped = training.gradient_accumulation > 1, training.optimizer.clip_norm is not None
    if summed or clipped:  # otherwise the update may use each gradient when it is computed
        params, _ = trainable.split(state.model, patterns)
        # the gradients of one micro-batch are reduced, one by one, before they are clipped
        stored = shardings(params, mesh, split=strategy.zero_stage > 1 or not summed)
        needed += shard_bytes(with_shardings(params, stored))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    what = f"with {'gradients and ' * (summed or clipped)}moments"
    check_memory(needed, mesh, f"model={count:,} parameters", what)
    if counted != model:
        abstract(model)
    return state.model


def _check_batch(
    model: DecoderConfig,
    mesh: Mesh,
    batch_size: int,
    length: int,
    microbatches: int,
    every: bool,
) -> None:
    """Check that a batch and the inputs of all layers, for the backward pass, fit the memory.

    The inputs are not counted if they are offloaded, or unless ``every`` parameter is trained: the
    backward pass ends at the first layer with a trained one.
    """
    needed, what = shard_bytes(abstract_batch(mesh, batch_size, length)), "a batch"
    if every and model.remat not in OFFLOADED:
        tokens = batch_size * length // (batch_ways(mesh) * mesh.shape["sequence"] * microbatches)
        needed += tokens * model.num_layers * model.width * jnp.dtype(model.dtype).itemsize
        what += " and the inputs of all layers"
    subject = f"data.batch_size={batch_size}, data.sequence_length={length}"
    check_memory(needed, mesh, subject, what)
