"""Whether the parts of a run fit one another and the devices: one check for a run and its plan."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from layers.config import check
from layers.decoder import DecoderConfig
from research.parallel import MeshConfig, batch_ways, validate
from research.parallel.zero import check_stage
from research.training import trainable
from research.training.config import TrainingConfig
from research.training.models import ModelConfig, build
from research.training.objectives import Objective
from research.training.offload import check_host
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state


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
    """Check that a run can train on ``mesh``, whose devices need not be there.

    Args:
      strategy: what ``mesh`` was made of.
      batch_size, sequence_length, vocabulary: of the data; None where they are not known before.
      patterns: what is trained.

    Raises:
      ConfigError: sizes that do not divide or do not fit, a field that changes nothing, or an
        optimiser that ``mesh`` or ``strategy`` does not support.
    """
    ways = batch_ways(mesh)
    check_stage(strategy.zero, model, dict(mesh.shape))
    check_host(model, strategy, mesh)
    if isinstance(model, DecoderConfig):
        _check_decoder(model, training, mesh, batch_size, sequence_length, vocabulary)
    else:
        stages = mesh.shape["stage"]
        check(stages == 1, "mesh.stage", stages, "must be 1: only a decoder's layers have stages")
        divides = f"must be a multiple of mesh stage×data×fsdp×expert={ways}"
        check(batch_size % ways == 0, "batch_size", batch_size, divides)
    # a process brings its own rows, whole: the other axes cannot reach across processes
    processes = len({device.process_index for device in mesh.devices.flat})
    check(
        ways % processes == 0,
        "mesh.stage×data×fsdp×expert",
        ways,
        f"must be a multiple of the {processes} processes",
    )
    parts, each = training.gradient_accumulation, batch_size // ways
    together = 1 if objective is None else objective.rows_together
    check(
        each % together == 0,
        "batch_size",
        batch_size,
        f"the {each} rows of a device must be a multiple of {together}, which belong together",
    )
    check(
        each // together % parts == 0,
        "training.gradient_accumulation",
        parts,
        f"must divide the {each // together} {'rows' if together == 1 else 'groups'} of a device",
    )
    optimizer = make_optimizer(training.optimizer, training.steps, offload=strategy.offload)
    trainable.check_patterns(jax.eval_shape(lambda: build(model, nnx.Rngs(0))), patterns)
    # refuses moments that the mesh or the stage does not shard
    abstract_state(
        model, optimizer, mesh, strategy.zero_stage, patterns=patterns, offload=strategy.offload
    )


def _check_decoder(
    model: DecoderConfig,
    training: TrainingConfig,
    mesh: Mesh,
    batch_size: int,
    sequence_length: int | None,
    vocabulary: int | None,
) -> None:
    # where the length is not known before, any that the mesh divides
    length = 2 * mesh.shape["sequence"] if sequence_length is None else sequence_length
    validate(model, mesh, batch_size=batch_size, sequence_length=length)
    check(
        vocabulary is None or vocabulary <= model.vocab_size,
        "model.vocab_size",
        model.vocab_size,
        f"must be at least the data's {vocabulary}",
    )
    limit = model.max_length if model.position == "learned" else None
    check(
        limit is None or sequence_length is None or sequence_length <= limit,
        "data.sequence_length",
        sequence_length,
        f"must be at most model.max_length={limit}",
    )
    check(
        not training.optimizer.master or model.param_dtype != "float32",
        "training.optimizer.master",
        True,
        "changes nothing: model.param_dtype is float32",
    )
