"""Loads a Hugging Face directory or an RWKV-7 file as a `Decoder`, one tensor at a time."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layers.config import ConfigError, check
from layers.decoder import Decoder, DecoderConfig
from layers.weights import flat
from pallas_kernels.names import suggest
from research.files import read_json
from research.memory import check_memory, shard_bytes
from research.models.families import Family, decoder_config, family_of
from research.models.families.rotary import with_context
from research.models.fields import Fields, short
from research.models.fp8 import DequantizedReader, Tensors, read_block
from research.models.headers import canonical_names, check_headers, check_sizes
from research.models.pth import SUFFIX, PthReader
from research.models.reader import Reader
from research.models.table import Target, from_theirs, targets
from research.parallel import make_mesh, shardings, use_mesh, validate_model
from research.parallel.rules import with_shardings

_ROWS = 4096  # of the embedding that are compared at once


def load(
    source: Path | str, *, mesh: Mesh | None = None, context: int | None = None, **overrides: Any
) -> Decoder:
    """The model in ``source``: a directory of config.json and weights, or a .pth file.

    Each tensor is read, converted and put onto ``mesh`` before the next one is read. FP8 weights
    are dequantised.

    Args:
      mesh: default: one device.
      context: the number of tokens that rotations of kind ``longrope`` and ``dynamic`` are for;
        transformers chooses them for each input, here they are fixed. Default: for ``longrope``
        max_position_embeddings, so the long factors; for ``dynamic`` the length of training.
      overrides: fields of the `DecoderConfig` that do not change the weights' shapes, e.g.
        ``dtype="bfloat16"``, ``param_dtype``, ``scan``, ``remat``.

    Raises:
      ConfigError: a missing or damaged file, an unsupported architecture or feature, or a tensor
        that is missing, unknown, or of a wrong shape or dtype; a mesh that does not divide the
        model. The message names it in one line. All but the values of a tied head is checked before
        any tensor is read.
    """
    fields = [field.name for field in dataclasses.fields(DecoderConfig)]
    for name, value in overrides.items():
        check(name in fields, name, value, f"no such field; {suggest(name, fields)}")
    hf, reader = open_model(Path(source))
    if isinstance(reader, DequantizedReader) and reader.count:
        warnings.warn(f"{reader.count} tensors are FP8: they are dequantised", stacklevel=2)
    family = family_of(hf)
    config = dataclasses.replace(decoder_config(hf), **overrides)
    if context is not None:
        config = with_context(config, context)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    validate_model(config, mesh)
    with ExitStack() as stack:
        stack.enter_context(reader)
        abstract, needed, names = match(config, family, reader)
        _check_head(reader, names, family, config)
        stack.enter_context(use_mesh(mesh))
        shapes: dict[str, Any] = flat(abstract)
        sharded = with_shardings(abstract, shardings(abstract, mesh))
        check_memory(shard_bytes(sharded), mesh, f"model={str(source)!r}", "its parameters")
        stored: dict[str, Any] = {path: leaf.sharding for path, leaf in flat(sharded).items()}
        arrays: dict[str, jax.Array] = {}
        for target in needed.values():
            parts = _read(reader, names.get(target.name), target, config)
            for path in target.paths:
                part = parts.pop(0).astype(shapes[path].dtype)
                arrays[path] = _put(arrays.get(path), part, target, shapes[path], stored[path])
                del part  # free this tensor before the next one is read
            del parts
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in shapes])


def match(
    config: DecoderConfig, family: Family, reader: Tensors
) -> tuple[Decoder, dict[str, Target], dict[str, str]]:
    """The shapes of the model, its tensors by name, and the names of these in the checkpoint.

    Raises:
      ConfigError: the headers of ``reader`` do not match ``config``. No tensor is read.
    """
    names = canonical_names(reader.names, family)
    headers = {name: reader.header(theirs) for name, theirs in names.items()}
    check_sizes(config, family, headers)
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    needed = {t.name: t for t in targets(family.rows, config, flat(abstract))}
    check_headers(headers, needed, family, config)
    return abstract, needed, names


def open_model(source: Path) -> tuple[dict[str, Any], Tensors]:
    """The config.json of ``source`` and a reader of its tensors."""
    if source.suffix == SUFFIX:
        reader = PthReader(source)
        return reader.describe(), reader
    hf, reader = read_object(source / "config.json"), Reader(source)
    block = read_block(Fields(hf))
    if block is None:
        return hf, reader
    return hf, DequantizedReader(reader, block)


def read_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file ``path``; raises `ConfigError` if it cannot be read."""
    check(path.parent.is_dir(), "directory", str(path.parent), "does not exist")
    check(path.is_file(), "directory", str(path.parent), f"must hold {path.name}")
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"file={str(path)!r}: must be an object, not {short(value)}")
    return value


def _check_head(
    reader: Tensors, names: Mapping[str, str], family: Family, config: DecoderConfig
) -> None:
    """Refuse a tied head that differs from the embedding; both are read in blocks of rows."""
    if not config.tie_embeddings or family.head not in names:
        return
    embedding, head = names[family.embedding], names[family.head]
    for start in range(0, config.vocab_size, _ROWS):
        rows = slice(start, min(start + _ROWS, config.vocab_size))
        if not np.array_equal(reader.read(embedding, rows), reader.read(head, rows)):
            requirement = f"differs from {family.embedding}, to which tie_word_embeddings ties it"
            raise ConfigError(f"tensor={family.head!r}: {requirement}")


def _read(
    reader: Tensors, name: str | None, target: Target, config: DecoderConfig
) -> list[np.ndarray]:
    """The tensor called ``name`` in the Decoder's layout: one part for each of ``target.paths``."""
    tensor = np.zeros(target.shape, np.float32) if name is None else reader.read(name)
    return from_theirs(target, tensor, config)


def _put(
    array: jax.Array | None,
    part: np.ndarray,
    target: Target,
    shape: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> jax.Array:
    """``array`` (zeros if None) with ``part`` at ``target.index``, in the stored sharding."""
    if not target.index:
        return jax.device_put(part, sharding)
    if array is None:
        array = _zeros(shape.shape, shape.dtype, sharding)()
    count = len(target.index)
    replace, row_sharding = _replace_row(sharding, count)
    row = jax.device_put(part.reshape(*[1] * count, *part.shape), row_sharding)
    return jax.block_until_ready(replace(array, row, target.index))


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding):
    """A function that makes sharded zeros; compiled once for all parameters of a shape."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _replace_row(sharding: NamedSharding, count: int) -> tuple[Callable, NamedSharding]:
    """``f(array, row, index)``: ``array`` with ``row`` at ``index`` of its first ``count`` axes.

    ``array`` has ``sharding``; ``row`` must have the sharding that is returned too. If an indexed
    axis is sharded, as that of experts is, only the devices that hold the index write.
    """
    mesh, spec = sharding.mesh, sharding.spec
    indexed = (*spec[:count], *[None] * (count - len(spec)))
    row_spec = PartitionSpec(*[None] * count, *spec[count:])

    def local(array, row, index):
        inside, start = True, []
        for i, axis, size in zip(index, indexed, array.shape, strict=False):
            first = 0 if axis is None else jax.lax.axis_index(axis) * size
            inside &= (i >= first) & (i < first + size)
            start.append(jnp.clip(i - first, 0, size - 1))
        start += [0] * (array.ndim - count)
        old = jax.lax.dynamic_slice(array, start, row.shape)
        return jax.lax.dynamic_update_slice(array, jnp.where(inside, row, old), start)

    replicated = PartitionSpec()
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, row_spec, replicated), out_specs=spec, check_vma=False
    )
    return jax.jit(run, donate_argnums=0), NamedSharding(mesh, row_spec)
