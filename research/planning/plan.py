"""What a program needs on a slice that is not here: bytes a device, collectives, the time at best.

The whole step is compiled ahead of time by the TPU's own compiler; nothing is allocated and no
device is looked for. Bytes and collectives are the compiled program's: over all three axes of a
torus (``fsdp:64`` on ``v5p:4x4x4``) XLA gathers and scatters by all-reduces, over two it does not.
FLOPs are the model's (`train_flops_per_token`) or what a custom step says; *executed* are those
with what is computed again in the backward pass and what a pipeline's stages compute while they
have nothing to do. The floor of a step's time is the longest of three, each at the data sheet's
peak:

- compute: executed FLOPs;
- memory: the state and the batch are read, the state is written, and whatever temporaries hold at
  their peak and collectives bring is written and read once (the link to the host is not counted:
  no data sheet gives its speed);
- links: what collectives move, around rings, over all of a device's links at once.

The program is no faster; how much slower it is, only the machine knows.
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
    """What the compiler says; of each device unless it says otherwise.

    ``parameters``: their number; None of a custom step. ``bytes`` of ``parameters``, ``moments``
    (or the ``cache``) and ``batch``, or of a custom step's arguments, and of ``temporaries``
    (activations and gradients, at their peak), with their ``total`` and the device's ``memory``.
    ``collectives``: kind → ``count`` and bytes ``moved`` a step; None if the program does not fit,
    for then there is none. ``flops`` of a step on all devices: ``model`` and ``executed``.
    ``floor``: seconds, see above. ``host``: bytes of moments in the memory of the device's host.
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
        """Bytes left of the device's memory; negative where the program does not fit."""
        return self.bytes["memory"] - self.bytes["total"]

    @property
    def seconds(self) -> float:
        """The floor of a step's time."""
        return max(self.floor.values())

    @property
    def bound(self) -> str:
        """What makes the floor."""
        return max(self.floor, key=lambda name: self.floor[name])


def plan(setup: Setup | CustomSetup) -> Plan:
    """Compile the step of ``setup`` and read what it needs.

    Raises:
      ConfigError: no such slice, no compiler for it, a mesh that does not divide the model or the
        batch, or a strategy that changes nothing; before anything is compiled.
    """
    check_setup(setup)
    mesh = topology_mesh(setup.topology, setup.mesh)
    kind = mesh.devices.flat[0].device_kind
    chip = chips.find(kind)
    if chip is None or not (chip.memory and chip.memory_bandwidth and chip.link_bandwidth):
        raise ConfigError(f"topology={setup.topology!r}: the peaks of {kind!r} are not known")
    step = make(setup, mesh)
    parts = step.arguments if step.parts is None else step.parts
    held = {name: _bytes(tree) for name, tree in parts.items()}
    started = time.perf_counter()
    total, found = _compile(step, mesh, sum(held.values()))
    seconds = time.perf_counter() - started
    held["temporaries"] = total - sum(held.values())
    written = sum(held[name] for name in step.written)
    brought = sum(c.size * c.times for c in found or ())
    touched = sum(held.values()) - held["temporaries"] + written
    touched += 2 * (held["temporaries"] + brought)
    host = sum(_bytes(tree, HOST) for tree in parts.values())
    touched += 2 * host  # what comes from there is read, what goes there is written
    work = step.flops if step.executed is None else step.executed
    executed = work / mesh.size
    floor = {"compute": executed / chip.flops, "memory": touched / chip.memory_bandwidth}
    if found is not None:
        floor["links"] = sum(c.moved for c in found) / chip.link_bandwidth
    return Plan(
        setup=setup,
        device=kind,
        devices=mesh.size,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        parameters=_count(parts["parameters"]) if isinstance(setup, Setup) else None,
        bytes={**held, "total": total, "memory": int(chip.memory)},
        flops={"model": step.flops, "executed": work},
        collectives=None if found is None else _by_kind(found),
        floor=floor,
        intensity=executed / touched,
        compile_seconds=seconds,
        host=host,
    )


def _compile(step: Step, mesh: Mesh, held: int) -> tuple[int, list[Collective] | None]:
    """Bytes that the program needs in all, and its collectives, if it can be at all."""
    try:
        with use_mesh(mesh):
            compiled, text = compile_with_text(step.function, *step.arguments.values())
    except jax.errors.JaxRuntimeError as error:
        match = _OUT_OF_MEMORY.search(str(error))
        if match is None:
            raise
        return max(held, int(float(match.group(1)) * _UNITS[match.group(2)])), None
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
    """Of ``tree``'s arrays on one device, or in a memory of its host."""
    leaves = [a for a in jax.tree.leaves(tree) if (a.sharding.memory_kind or "device") == memory]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    sizes = [math.prod(s) * leaf.dtype.itemsize for s, leaf in zip(shapes, leaves, strict=True)]
    return sum(sizes)


def _by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    kinds = {}
    for kind in KINDS:
        of_kind = [c for c in found if c.kind == kind]
        if of_kind:
            count, moved = sum(c.times for c in of_kind), sum(c.moved for c in of_kind)
            kinds[kind] = {"count": count, "moved": moved}
    return kinds
