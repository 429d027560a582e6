"""Whether the parts of a run fit one another and the devices: one check for a run and its plan."""

from jax.sharding import Mesh

from layers.config import check
from layers.decoder import DecoderConfig
from research.parallel import MeshConfig, batch_ways, validate
from research.parallel.zero import check_stage
from research.training.config import TrainingConfig
from research.training.offload import check_host
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state


def check_run(
    model: DecoderConfig,
    training: TrainingConfig,
    strategy: MeshConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    sequence_length: int,
    vocabulary: int,
) -> None:
    """Check that a run can train on ``mesh``, whose devices need not be there.

    Args:
      strategy: what ``mesh`` was made of.
      batch_size, sequence_length, vocabulary: of the data.

    Raises:
      ConfigError: sizes that do not divide or do not fit, a field that changes nothing, or an
        optimiser that ``mesh`` or ``strategy`` does not support.
    """
    validate(model, mesh, batch_size=batch_size, sequence_length=sequence_length)
    check_stage(strategy.zero, model, dict(mesh.shape))
    check_host(model, strategy, mesh)
    check(
        vocabulary <= model.vocab_size,
        "model.vocab_size",
        model.vocab_size,
        f"must be at least the data's {vocabulary}",
    )
    limit = model.max_length if model.position == "learned" else None
    check(
        limit is None or sequence_length <= limit,
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
    ways = batch_ways(mesh)
    # a process brings its own rows, whole: the other axes cannot reach across processes
    processes = len({device.process_index for device in mesh.devices.flat})
    check(
        ways % processes == 0,
        "mesh.stage×data×fsdp×expert",
        ways,
        f"must be a multiple of the {processes} processes",
    )
    parts, each = training.gradient_accumulation, batch_size // ways
    check(
        each % parts == 0,
        "training.gradient_accumulation",
        parts,
        f"must divide the {each} rows of a device",
    )
    optimizer = make_optimizer(training.optimizer, training.steps, offload=strategy.offload)
    # refuses moments that the mesh or the stage does not split
    abstract_state(model, optimizer, mesh, strategy.zero_stage, offload=strategy.offload)
