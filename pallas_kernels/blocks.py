"""Block sizes of an operation, per platform and per chip, from the table ``<op>/blocks.json``.

``platform → sizes`` is for all chips of a platform; ``device kind → sizes`` (the value of
`jax.Device.device_kind`) overrides it for one chip.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax

from pallas_kernels.dispatch import check


def path(op: str) -> Path:
    """The file with the table of ``op``."""
    return Path(__file__).parent / op / "blocks.json"


@functools.cache
def table(op: str) -> dict[str, dict[str, int]]:
    """The table of ``op``; call ``table.cache_clear()`` after writing it."""
    return json.loads(path(op).read_text())


def block_sizes(
    op: str, platform: str, override: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The block sizes of ``op`` on ``platform`` (``"tpu"``, ``"gpu"`` or ``"cpu"``).

    They are those of the chip if this process has one of this platform, else those of the platform
    (in compilation ahead of time). ``override`` has priority over both.

    Raises:
      ValueError: an override that names no size of this op, or is not a positive integer.
    """
    rows = table(op)
    sizes = dict(rows[platform])
    device = jax.devices()[0]
    if device.platform == platform and device.device_kind in rows:
        sizes.update(rows[device.device_kind])
    for name, value in (override or {}).items():
        check(name in sizes, f"blocks.{name}", value, f"no such size; {op} has {', '.join(sizes)}")
        check(isinstance(value, int) and value > 0, f"blocks.{name}", value, "must be > 0")
        sizes[name] = value
    return sizes
