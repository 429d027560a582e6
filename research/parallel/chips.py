"""Peak rates and memory of accelerators, from their makers' data sheets."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device (of a TPU7x: one of the chip's two cores).

    ``flops``: dense bfloat16 FLOP/s. ``memory``: bytes that a program can use, as XLA reports them
    when a program requires more. ``memory_bandwidth``: bytes/s. ``link_bandwidth``: bytes/s that
    the device sends over all its links together.
    """

    flops: float
    memory: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None


# the keys are prefixes of JAX's device_kind; TPU numbers are from docs.cloud.google.com/tpu/docs
CHIPS = {
    "NVIDIA A100": Chip(312e12),
    "NVIDIA H100": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
    "TPU v4": Chip(275e12),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95.73 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1638e9, 400e9),
    "TPU7x": Chip(2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 300e9),
}


def find(device_kind: str) -> Chip | None:
    """The chip of JAX's ``device_kind``, or None if the table does not list it."""
    return next((chip for name, chip in CHIPS.items() if device_kind.startswith(name)), None)
