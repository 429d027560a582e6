"""The device mesh: six named axes, each of which may have size 1."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from layers.config import ConfigError, check, check_types

# in this order: the first axes go across hosts, where there are several
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The size of each mesh axis; −1 on one axis takes all remaining devices.

    ``data``: batches are sharded, parameters replicated. ``fsdp``: batches and parameters are
    sharded (ZeRO-3). ``expert``: batches and experts. ``sequence``: time. ``tensor``: heads, hidden
    units and vocabulary. ``stage``: layers, in consecutive groups (`layers.pipeline`); outside the
    layers, batches. ``zero``: the stage of ZeRO, which says what ``fsdp`` shards besides batches: 1
    optimiser moments, 2 gradients too, 3 (None) parameters too. ``offload``: optimiser moments are
    stored in the memory of each device's host.
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
        check_types(self)
        check(self.zero in (None, 1, 2, 3), "zero", self.zero, "must be 1, 2 or 3")
        for name in AXES:
            size = getattr(self, name)
            check(
                size == -1 or size > 0, name, size, "must be > 0, or -1 for all remaining devices"
            )
        remaining = [name for name in AXES if getattr(self, name) == -1]
        check(len(remaining) <= 1, "mesh", remaining, "at most one axis may be -1")

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO: ``zero``, or 3 if it is None."""
        return self.zero or 3

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis → size on ``num_devices`` devices.

        Raises:
          ConfigError: the product of the sizes is not ``num_devices``.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        product = math.prod(n for n in sizes.values() if n != -1)
        text = " × ".join(f"{name}={n}" for name, n in sizes.items() if n != 1) or "1"
        for name, n in sizes.items():
            if n == -1:
                if num_devices % product:
                    raise ConfigError(
                        f"mesh={text}: {product} must divide the number of devices, {num_devices}"
                    )
                sizes[name] = num_devices // product
        total = math.prod(sizes.values())
        if total != num_devices:
            raise ConfigError(f"mesh={text}: requires {total} devices, there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence | None = None) -> Mesh:
    """A mesh with the axes of ``config`` over ``devices`` (default: all), explicitly sharded.

    On one device nothing is sharded, so its axes are of type `AxisType.Auto`: no type mentions a
    sharding.

    Raises:
      ConfigError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    axis_type = AxisType.Explicit if len(devices) > 1 else AxisType.Auto
    # a mesh axis may use a part of a TPU slice's physical axis: 8 × 8 on 4 × 4 × 4
    device_array = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(device_array, tuple(sizes), axis_types=(axis_type,) * len(sizes))
