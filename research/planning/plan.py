"""What a program needs on a slice that is not here: bytes a device, collectives, the time at best.

The whole step is compiled ahead of time by the TPU's own compiler; nothing is allocated and no
device is looked for. Bytes and collectives are the compiled program's: over all three axes of a
torus (``fsdp:64`` on ``v5p:4x4x4``) XLA gathers and scatters by all-reduces, over two it does not.
FLOPs are the model's (`train_flops_per_token`), and *executed* are those with what is computed
again in the backward pass and what a pipeline's stages compute while they have nothing to do. The
floor of a step's time is the longest of three, each at the data sheet's peak:

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
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layers.config import ConfigError, check
from layers.decoder import Decoder, DecoderConfig
from layers.pipeline import idle
from research.parallel import (
    MeshConfig,
    abstract_batch,
    chips,
    shardings,
    use_mesh,
    validate,
)
from research.parallel.rules import placed
from research.planning.program import KINDS, Collective, collectives
from research.planning.topology import compile_with_text, topology_mesh
from research.training import TrainingConfig
from research.training.check import check_run
from research.training.flops import (
    forward_flops_per_token,
    recomputed_flops_per_token,
    train_flops_per_token,
)
from research.training.offload import HOST
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import make_step

_OUT_OF_MEMORY = re.compile(r"total memory required [^(]*\(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned: ``model`` on the ``mesh`` of ``topology``, by batches of this size.

    ``training`` None: decoding, one token after ``sequence_length`` cached ones. ``vocabulary``: of
    the data, 0 if unknown; the program is the same for any, so that it does not distinguish setups.
    """

    model: DecoderConfig
    topology: str
    mesh: MeshConfig
    batch_size: int
    sequence_length: int
    training: TrainingConfig | None = None
    vocabulary: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says; of each device unless it says otherwise.

    ``bytes`` of ``parameters``, ``moments`` (or the ``cache``), ``batch`` and ``temporaries``
    (activations and gradients, at their peak), with their ``total`` and the device's ``memory``.
    ``collectives``: kind → ``count`` and bytes ``moved`` a step; None if the program does not fit,
    for then there is none. ``flops`` of a step on all devices: ``model`` and ``executed``.
    ``floor``: seconds, see above. ``host``: bytes of moments in the memory of the device's host.
    """

    setup: Setup
    device: str
    devices: int
    mesh: Mapping[str, int]
    parameters: int
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


def plan(setup: Setup) -> Plan:
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
    step, arguments, donated = _training(setup, mesh) if setup.training else _decoding(setup, mesh)
    held = {name: _bytes(tree) for name, tree in arguments.items()}
    started = time.perf_counter()
    total, found = _compile(step, tuple(donated), mesh, sum(held.values()))
    seconds = time.perf_counter() - started
    held["temporaries"] = total - sum(held.values())
    model = arguments["parameters"]
    work = _flops(setup, model)
    state = sum(_bytes(a) for a in (model, arguments["moments"])) if setup.training else 0
    brought = sum(c.size * c.times for c in found or ())
    touched = sum(held.values()) - held["temporaries"] + state
    touched += 2 * (held["temporaries"] + brought)
    host = sum(_bytes(tree, HOST) for tree in arguments.values())
    touched += 2 * host  # what comes from there is read, what goes there is written
    executed = work["executed"] / mesh.size
    floor = {"compute": executed / chip.flops, "memory": touched / chip.memory_bandwidth}
    if found is not None:
        floor["links"] = sum(c.moved for c in found) / chip.link_bandwidth
    return Plan(
        setup=setup,
        device=kind,
        devices=mesh.size,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        parameters=sum(math.prod(a.shape) for a in jax.tree.leaves(model)),
        bytes={**held, "total": total, "memory": int(chip.memory)},
        flops=work,
        collectives=None if found is None else _by_kind(found),
        floor=floor,
        intensity=executed / touched,
        compile_seconds=seconds,
        host=host,
    )


def check_setup(setup: Setup) -> None:
    """Raise `ConfigError` for a ``setup`` that cannot be on its slice, before anything compiles."""
    mesh = topology_mesh(setup.topology, setup.mesh)
    model, training, size = setup.model, setup.training, setup.batch_size
    if training is not None:
        check_run(
            model,
            training,
            setup.mesh,
            mesh,
            batch_size=size,
            sequence_length=setup.sequence_length,
            vocabulary=setup.vocabulary,
        )
        return
    zero, offload = setup.mesh.zero, setup.mesh.offload
    check(zero is None, "mesh.zero", zero, "changes nothing: decoding has no gradients")
    check(not offload, "mesh.offload", offload, "changes nothing: decoding has no moments")
    known = set(model.pattern) <= {"attention", "sliding"}
    check(known, "model.pattern", model.pattern, "only caches of attention are laid out on a mesh")
    for axis, why in (("sequence", "a token cannot be split"), ("stage", "a pipeline trains")):
        check(mesh.shape[axis] == 1, f"mesh.{axis}", mesh.shape[axis], f"must be 1: {why}")
    validate(model, mesh, batch_size=size, sequence_length=1)


def _training(setup: Setup, mesh: Mesh):
    """The step, its arguments by name for their bytes, and the arguments themselves."""
    training, model, size = setup.training, setup.model, setup.batch_size
    assert training is not None
    stage, offload = setup.mesh.zero_stage, setup.mesh.offload
    optimizer = make_optimizer(training.optimizer, training.steps, offload=offload)
    state = abstract_state(model, optimizer, mesh, stage, offload=offload)
    batch = abstract_batch(mesh, size, setup.sequence_length)
    named = {"parameters": state.model, "moments": state.optimizer, "batch": batch}
    return make_step(training, stage=stage, offload=offload), named, (state, batch)


def _decoding(setup: Setup, mesh: Mesh):
    """As `_training`: one more token for each row of the batch."""
    config, size = setup.model, setup.batch_size
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = placed(abstract, shardings(abstract, mesh))
    with use_mesh(mesh):
        empty = jax.eval_shape(lambda m: m.init_state(size, setup.sequence_length), model)
    # on one device there are no sharded types
    where = jax.tree.map(
        lambda a: NamedSharding(mesh, a.sharding.spec if a.sharding else PartitionSpec()), empty
    )
    cache, batch = placed(empty, where), abstract_batch(mesh, size, 1)

    def step(model, cache, tokens_bt, positions_bt):
        output = model(tokens_bt, positions_bt, state=cache)
        return jnp.argmax(output.logits_btv, axis=-1), output.state

    token = batch["tokens"], batch["positions"]
    named = {"parameters": model, "cache": cache, "batch": token}
    return jax.jit(step, donate_argnums=1), named, (model, cache, *token)


def _compile(step, arguments, mesh: Mesh, held: int) -> tuple[int, list[Collective] | None]:
    """Bytes that the program needs in all, and its collectives, if it can be at all."""
    try:
        with use_mesh(mesh):
            compiled, text = compile_with_text(step, *arguments)
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


def _flops(setup: Setup, model: Decoder) -> dict[str, float]:
    """Of a step on all devices."""
    length, rows = setup.sequence_length, setup.batch_size
    if setup.training is None:
        each = forward_flops_per_token(model, length, cached=True)
        return {"model": each * rows, "executed": each * rows}
    each = train_flops_per_token(model, length)
    again = recomputed_flops_per_token(model, length)
    config = setup.model
    if config.microbatches is not None:  # stages compute in the ticks that are not theirs too
        stages = topology_mesh(setup.topology, setup.mesh).shape["stage"]
        share = idle(stages, config.microbatches, config.circuits)
        head = 6.0 * config.vocab_size * config.width
        again += (each + again - head) * share / (1 - share)
    return {"model": each * rows * length, "executed": (each + again) * rows * length}


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
