"""The device mesh, the rules from logical axes to mesh axes, and runs of several processes."""

from research.parallel.mesh import MeshConfig, make_mesh
from research.parallel.processes import initialize
from research.parallel.rules import (
    abstract_batch,
    batch_ways,
    shard_batch,
    shardings,
    time_order,
    use_mesh,
    validate,
    validate_model,
)

__all__ = [
    "MeshConfig",
    "abstract_batch",
    "batch_ways",
    "initialize",
    "make_mesh",
    "shard_batch",
    "shardings",
    "time_order",
    "use_mesh",
    "validate",
    "validate_model",
]
