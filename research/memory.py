"""Whether arrays fit the memory of the devices: checked before anything is allocated.

An allocation that cannot be served may hang or end the process without a word.
"""

import contextlib
import os
import resource
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from layers.config import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def host_memory() -> int:
    """Bytes that this process may use: of the machine, its control groups and ``ulimit -v``."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        limits.append(limit)
    with contextlib.suppress(OSError):
        for line in _OWN_CGROUP.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:  # version 2
                folder, name = _CGROUPS, "memory.max"
            elif "memory" in controllers.split(","):
                folder, name = _CGROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            for part in ("", *Path(group).parts[1:]):  # a group limits those inside it
                folder /= part
                with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def device_memory(device: Any) -> int | None:
    """Bytes of memory of ``device``; of a CPU, what this process may use. None if it says none.

    A GPU says none with ``XLA_PYTHON_CLIENT_ALLOCATOR=platform``.
    """
    if device.platform == "cpu":
        return host_memory()
    return (device.memory_stats() or {}).get("bytes_limit") or None


def shard_bytes(tree: Any) -> int:
    """Bytes of each device's shards of ``tree``: arrays, or `jax.ShapeDtypeStruct`.

    Arrays that are stored in the host's memory are not counted. A leaf without a sharding is whole.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and sharding.memory_kind in ("pinned_host", "unpinned_host"):
            if next(iter(sharding.device_set)).platform != "cpu":
                continue
        count = 1
        for size in leaf.shape if sharding is None else sharding.shard_shape(leaf.shape):
            count *= size
        total += count * leaf.dtype.itemsize
    return total


def check_memory(needed: int, mesh: Mesh, subject: str, what: str) -> None:
    """Raise `ConfigError`, with both numbers, if ``needed`` bytes per device exceed its memory.

    ``subject`` is ``field=value``; ``what`` requires the memory. The CPU devices of a process share
    its memory. Devices that do not exist, or do not say how much they have, are not checked.
    """
    if mesh.devices.flat[0] not in jax.devices():
        return
    device = mesh.local_devices[0]
    memory = device_memory(device)
    if memory is None:
        return
    if device.platform == "cpu":
        memory //= len(mesh.local_devices)
    if needed > memory:
        raise ConfigError(
            f"{subject}: {what}, {spell(needed)} per device, must fit into {spell(memory)} of "
            "memory"
        )


def spell(size: int) -> str:
    """``size`` bytes in GB, or in MB if that is clearer."""
    unit, name = (10**9, "GB") if size >= 10**8 else (10**6, "MB")
    number = Decimal(size) / unit  # a float may be too small for it
    return f"{number:,.0f} {name}" if 100 <= number < 10**9 else f"{number:.3g} {name}"
