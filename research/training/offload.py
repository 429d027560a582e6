"""Moments in the host's memory (ZeRO-Offload, Ren 2021, arXiv:2101.06840, §3).

They are moved to the device for the update, one layer at a time, and back. Unlike in the paper, the
device computes the update.
"""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from layers.architecture import OFFLOADED
from layers.config import ConfigError, check
from research.parallel.mesh import MeshConfig
from research.parallel.zero import to_stored_sharding
from research.training.layerwise import between

HOST = "pinned_host"


def with_moments_on_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer`` with moments that are stored in the host's memory between updates.

    Raises:
      ConfigError: on ``init``, if the optimiser has no moments.
    """
    moved = between(optimizer, _to(jax.memory.Space.Device), _to(jax.memory.Space.Host))

    def init(params):
        # `abstract_state` gives the shardings in the host's memory
        state = optimizer.init(params)
        if not any(map(is_on_host, jax.tree.leaves(state))):
            raise ConfigError("mesh.offload=True: changes nothing: the optimiser has no moments")
        return state

    return optax.GradientTransformation(init, moved.update)


def check_host(model: Any, strategy: MeshConfig, mesh: Mesh) -> None:
    """Raise `ConfigError` for offloading on devices that have no memory besides the host's."""
    if mesh.devices.flat[0].platform != "cpu":
        return
    nothing = "changes nothing: a CPU's memory is the host's"
    check(not strategy.offload, "mesh.offload", True, nothing)
    remat = getattr(model, "remat", "none")
    check(remat not in OFFLOADED, "model.remat", remat, nothing)


def is_on_host(moment: Any) -> bool:
    """Whether an array of the optimiser's state is offloaded: all except counters."""
    return moment.ndim > 0


def to_host(rests: Any, state: Any) -> Any:
    """The stored shardings ``rests`` of an optimiser's ``state``, with its moments on the host."""
    return jax.tree.map(
        lambda a, sharding: sharding.with_memory_kind(HOST) if is_on_host(a) else sharding,
        state,
        rests,
    )


def _to(space: Any):
    def move(state):
        stored = to_stored_sharding(state) if space == jax.memory.Space.Host else state
        return jax.tree.map(lambda a: jax.device_put(a, space) if is_on_host(a) else a, stored)

    return move
