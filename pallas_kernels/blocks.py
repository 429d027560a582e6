"""Block sizes of an op, per platform and per chip: the table is ``<op>/blocks.json``.

``platform → sizes`` holds for every chip of a platform; ``device kind → sizes`` (as
`jax.Device.device_kind` spells it) overrides it for one chip.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax

from pallas_kernels.dispatch import check


def path(op: str) -> Path:
    """Where the table of ``op`` is kept."""
    return Path(__file__).parent / op / "blocks.json"


@functools.cache
def table(op: str) -> dict[str, dict[str, int]]:
    """The table of ``op``; ``table.cache_clear()`` after writing it."""
    return json.loads(path(op).read_text())


def block_sizes(
    op: str, platform: str, override: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Sizes for ``op`` on ``platform`` (``"tpu"``, ``"gpu"`` or ``"cpu"``), as a dict.

    The chip's own sizes are used when this process runs on one; a program compiled ahead of time
    for a platform that is absent gets the platform's. ``override`` wins over both.

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
