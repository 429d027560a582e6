"""Bytes per device, collectives and the shortest possible time of a step on a TPU slice.

The whole step is compiled ahead of time by the TPU's own compiler; nothing is allocated, and no
device is required. Bytes and collectives are those of the compiled program. Over all three axes of
a torus (``fsdp:64`` on ``v5p:4x4x4``) XLA uses all-reduces in place of all-gathers and
reduce-scatters; over two axes it does not. FLOPs are those of the model (`train_flops_per_token`)
or those that a custom step gives. *Executed* FLOPs include what is computed again in the backward
pass, and what the stages of a pipeline compute while they are idle. The floor of a step's time is
the longest of three times, each at the peak rate of the data sheet:

- compute: executed FLOPs;
- memory: the state and the batch are read, the state is written, and temporaries at their peak and
  the results of collectives are written and read once (transfers to the host are not counted: no
  data sheet gives their rate);
- links: bytes sent by collectives, around rings, over all links of a device together.

The program cannot be faster than that. How much slower it is can only be measured.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from layers.config import ConfigError
from research.parallel import chips, use_mesh
from research.planning.program import KINDS, Collective, collectives
from research.planning.step import CustomSetup, Setup, Step, check_setup, make
from research.planning.topology import compile_with_text, topology_mesh
from research.training.offload import HOST

_OUT_OF_MEMORY = re.compile(r"total memory required [^(]*\(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The requirements of a compiled step, per device unless stated otherwise.

    ``parameters``: their number; None for a custom step. ``bytes``: of ``parameters``, ``moments``
    (or the ``cache``) and ``batch``, or of the arguments of a custom step, and of ``temporaries``
    (activations and gradients, at their peak); also their ``total`` and the device's ``memory``.
    ``collectives``: kind → ``count`` and bytes ``moved`` per step; None if the program does not
    fit, because it is then not compiled. ``flops``: of a step on all devices, ``model`` and
    ``executed``. ``floor``: seconds, see above. ``host``: bytes of moments in the memory of the
    device's host.
    """

    setup: Setup | CustomSetup
    device: str
    devices: int
    mesh: Mapping[str, int]
    parameters: int | None
    bytes: Mapping[str, int]
    flops: Mapping[str, float]
    collectives: Mapping[str, Mapping[str, float]] | None
    floor: Mapping[str, float]
    intensity: float
    compile_seconds: float
    host: int = 0

    @property
    def fits(self) -> bool:
        return self.bytes["total"] <= self.bytes["memory"]

    @property
    def spare(self) -> int:
        """Unused bytes of the device's memory; negative if the program does not fit."""
        return self.bytes["memory"] - self.bytes["total"]

    @property
    def seconds(self) -> float:
        """The floor of a step's time."""
        return max(self.floor.values())

    @property
    def bound(self) -> str:
        """The longest of the times in ``floor``: ``compute``, ``memory`` or ``links``."""
        return max(self.floor, key=lambda name: self.floor[name])


def plan(setup: Setup | CustomSetup) -> Plan:
    """Compile the step of ``setup`` and read what it requires.

    Raises:
      ConfigError: an unknown slice, no compiler for it, a mesh that does not divide the model or
        the batch, or a strategy that changes nothing; raised before compilation.
    """
    check_setup(setup)
    mesh = topology_mesh(setup.topology, setup.mesh)
    kind = mesh.devices.flat[0].device_kind
    chip = chips.find(kind)
    if chip is None or not (chip.memory and chip.memory_bandwidth and chip.link_bandwidth):
        raise ConfigError(
            f"topology={setup.topology!r}: the peak rates of {kind!r} are not in the table"
        )
    step = make(setup, mesh)
    parts = step.arguments if step.parts is None else step.parts
    sizes = {name: _bytes(tree) for name, tree in parts.items()}
    started = time.perf_counter()
    total, collectives_found = _compile(step, mesh, sum(sizes.values()))
    seconds = time.perf_counter() - started
    sizes["temporaries"] = total - sum(sizes.values())
    written = sum(sizes[name] for name in step.written)
    collected = sum(c.size * c.times for c in collectives_found or ())
    accessed = sum(sizes.values()) - sizes["temporaries"] + written
    accessed += 2 * (sizes["temporaries"] + collected)
    host = sum(_bytes(tree, HOST) for tree in parts.values())
    accessed += 2 * host  # read for the update and written after it
    executed_flops = step.flops if step.executed is None else step.executed
    executed = executed_flops / mesh.size
    floor = {"compute": executed / chip.flops, "memory": accessed / chip.memory_bandwidth}
    if collectives_found is not None:
        floor["links"] = sum(c.moved for c in collectives_found) / chip.link_bandwidth
    return Plan(
        setup=setup,
        device=kind,
        devices=mesh.size,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        parameters=_count(parts["parameters"]) if isinstance(setup, Setup) else None,
        bytes={**sizes, "total": total, "memory": int(chip.memory)},
        flops={"model": step.flops, "executed": executed_flops},
        collectives=None if collectives_found is None else _by_kind(collectives_found),
        floor=floor,
        intensity=executed / accessed,
        compile_seconds=seconds,
        host=host,
    )


def _compile(step: Step, mesh: Mesh, argument_bytes: int) -> tuple[int, list[Collective] | None]:
    """Bytes that the program requires, and its collectives, or None if it does not fit."""
    try:
        with use_mesh(mesh):
            compiled, text = compile_with_text(step.function, *step.arguments.values())
    except jax.errors.JaxRuntimeError as error:
        match = _OUT_OF_MEMORY.search(str(error))
        if match is None:
            raise
        return max(argument_bytes, int(float(match.group(1)) * _UNITS[match.group(2)])), None
    analysis: Any = compiled.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
    return int(total), collectives(text, mesh.size)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any, memory: str = "device") -> int:
    """Bytes of ``tree``'s arrays on one device, or in the given memory of its host."""
    leaves = [a for a in jax.tree.leaves(tree) if (a.sharding.memory_kind or "device") == memory]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    sizes = [math.prod(s) * leaf.dtype.itemsize for s, leaf in zip(shapes, leaves, strict=True)]
    return sum(sizes)


def _by_kind(items: list[Collective]) -> dict[str, dict[str, float]]:
    kinds = {}
    for kind in KINDS:
        of_kind = [c for c in items if c.kind == kind]
        if of_kind:
            count, moved = sum(c.times for c in of_kind), sum(c.moved for c in of_kind)
            kinds[kind] = {"count": count, "moved": moved}
    return kinds
