"""The device mesh: six named axes, any of which may be 1."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from layers.config import ConfigError, check

# the first reach furthest: between hosts, where there are several
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each axis splits; −1 on one axis takes the devices the others leave.

    ``data``: batches split, parameters copied. ``fsdp``: batches and parameters split (ZeRO-3).
    ``expert``: batches and experts split. ``sequence``: time split. ``tensor``: heads, hidden units
    and vocabulary split. ``stage``: layers split, one group after the other, and batches outside
    them (`layers.pipeline`). ``zero``: the stage of ZeRO, which says what ``fsdp`` splits beside
    batches: 1 optimiser moments, 2 gradients as well, 3 (None) parameters as well. ``offload``:
    optimiser moments rest in the memory of each device's host.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    stage: int = 1
    zero: int | None = None
    offload: bool = False

    def __post_init__(self):
        check(self.zero in (None, 1, 2, 3), "zero", self.zero, "must be 1, 2 or 3")
        for name in AXES:
            size = getattr(self, name)
            check(size == -1 or size > 0, name, size, "must be > 0, or -1 to fill")
        wild = [name for name in AXES if getattr(self, name) == -1]
        check(len(wild) <= 1, "mesh", wild, "only one axis may be -1")

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO that is in force."""
        return self.zero or 3

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis → size on ``num_devices``; raises `ConfigError` unless they multiply to it."""
        sizes = {name: getattr(self, name) for name in AXES}
        known = math.prod(n for n in sizes.values() if n != -1)
        spelt = " × ".join(f"{name}={n}" for name, n in sizes.items() if n != 1) or "1"
        for name, n in sizes.items():
            if n == -1:
                if num_devices % known:
                    raise ConfigError(
                        f"mesh={spelt}: {num_devices} devices do not divide by {known}"
                    )
                sizes[name] = num_devices // known
        total = math.prod(sizes.values())
        if total != num_devices:
            raise ConfigError(f"mesh={spelt}: needs {total} devices, there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence | None = None) -> Mesh:
    """A mesh with the axes of ``config`` over ``devices`` (default: all), explicitly sharded.

    On one device nothing is sharded, and types that say so would only be in the way.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    kind = AxisType.Explicit if len(devices) > 1 else AxisType.Auto
    # an axis may take part of one of a TPU slice's own: 8 × 8 of 4 × 4 × 4
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, tuple(sizes), axis_types=(kind,) * len(sizes))
