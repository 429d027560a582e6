"""Logical axes: the identity without rules, mesh axes with them."""

import jax.numpy as jnp
from flax.core.spmd import logical_axis_rules
from jax.sharding import PartitionSpec

from layers.sharding import gather, reshard, spec


def test_without_rules_nothing_happens():
    x = jnp.ones((2, 3))
    assert spec("batch", None) is None
    assert reshard(x, "batch", None) is x and gather(x, ("batch", None)) is x


def test_rules_name_mesh_axes():
    with logical_axis_rules((("batch", ("data", "fsdp")), ("heads", "tensor"))):
        assert spec("batch", None, "heads", "unknown") == PartitionSpec(
            ("data", "fsdp"), None, "tensor", None
        )
