"""An engine's programs in a folder: compiled once, loaded by every process that serves."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from layers.decoder import Decoder
from layers.outputs_first import for_decoding
from research.inference.compiled import Compiler, Program, load, make_stamp, save
from research.inference.engine.config import EngineConfig
from research.inference.engine.programs import Chunk, Programs, new_memory, program_names
from research.inference.sampling import SamplingConfig, SamplingRows
from research.parallel import use_mesh


def save_programs(
    directory: Path,
    model: Decoder,
    config: EngineConfig,
    *,
    mesh: Mesh | None = None,
    compiler: Compiler | None = None,
) -> None:
    """Compile the programs of an engine for ``model`` and write them into ``directory``.

    Args:
      model: arrays, or `jax.ShapeDtypeStruct` with shardings: values do not count.
      mesh: that of the engine; it may be that of a topology, with the ``compiler`` for it.
      compiler: see `research.inference.compiled.store.save`.

    Raises:
      ConfigError: the engine cannot serve the model, or see `save`.
    """
    config.check_model(model.config)
    with _on(mesh):
        programs, stamp = _describe(model, config, mesh)
        save(programs, directory, stamp, compiler=compiler)


def load_programs(
    directory: Path,
    model: Decoder,
    config: EngineConfig,
    *,
    mesh: Mesh | None = None,
    portable: bool = False,
) -> Mapping[str, jax.stages.Compiled]:
    """The programs in ``directory``, for ``Engine(model, config, mesh=mesh, compiled=…)``.

    See `research.inference.compiled.store.load`.

    Raises:
      ConfigError: the engine cannot serve the model, or ``directory`` was written for weights of
        other shapes, another configuration, device, version or user: names the field.
    """
    config.check_model(model.config)
    with _on(mesh):
        programs, stamp = _describe(model, config, mesh)
        return load(programs, directory, stamp, portable=portable)


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)


def _describe(
    model: Decoder, config: EngineConfig, mesh: Mesh | None
) -> tuple[dict[str, Program], dict[str, Any]]:
    """The programs of an engine with abstract arguments, and their stamp."""
    weights = _shaped(mesh, for_decoding, model)
    # of the other fields, none changes a program
    sizes = dataclasses.replace(config, queue=None, snapshots=EngineConfig.snapshots)
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    stamp = make_stamp(weights, {"model": weights.config, "engine": sizes}, devices)
    return _programs(weights, config, mesh), stamp


def _programs(weights: Decoder, config: EngineConfig, mesh: Mesh | None) -> dict[str, Program]:
    """Each program with its arguments, as `Runner` calls it."""
    programs, vocab = Programs(weights), weights.config.vocab_size

    def ints(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    leaves, slots = programs.leaves, config.slots
    memory = _shaped(mesh, lambda leaves: new_memory(programs.models(leaves), config), leaves)
    table_bn = ints(slots, config.pages_per_slot) if config.cache.kind == "paged" else None
    row = jax.eval_shape(lambda: SamplingRows.of(SamplingConfig(), vocab, [0]))
    tokens_t, one = ints(config.chunk), ints()
    echo, active_b = (jax.ShapeDtypeStruct(shape, bool) for shape in ((), (slots,)))
    allowed_bv = _shaped(mesh, lambda: jnp.ones((slots, vocab), bool))
    arguments: dict[str, tuple[Any, ...]] = {
        "chunk": (leaves, memory, table_bn, Chunk(one, tokens_t, tokens_t, one, one, echo)),
        "admit": (memory, one, row, one, one),
        "decode": (leaves, memory, table_bn, active_b, ints(slots), allowed_bv),
        "copy": (memory, one, one, one, one),
        "snapshot": (memory, one),
    }
    if config.prefix:
        arguments["resume"] = (memory, one, _shaped(mesh, programs.snapshot, memory, one), one)
    names = program_names(config)
    return {name: Program(getattr(programs, name), arguments[name]) for name in names}


def _shaped(mesh: Mesh | None, function: Any, *arguments: Any) -> Any:
    """The results of ``function`` as `jax.ShapeDtypeStruct`; on a mesh, with their shardings."""

    def with_sharding(leaf):
        sharding = None if mesh is None else NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, jax.eval_shape(function, *arguments))
