"""Where arrays live: the device mesh, and the one table from logical axis names to mesh axes."""

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
]
