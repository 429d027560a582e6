"""Loads a Hugging Face directory or an RWKV-7 file as a `Decoder`, one tensor at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from layers.config import ConfigError, check
from layers.decoder import Decoder, DecoderConfig
from layers.weights import flat
from research.files import read_json
from research.models.families import Family, decoder_config, family_of
from research.models.pth import SUFFIX, PthReader
from research.models.table import Target, from_theirs, targets
from research.parallel import make_mesh, shardings, use_mesh


def load(source: Path | str, *, mesh: Mesh | None = None, **overrides: Any) -> Decoder:
    """The model in ``source``: a directory of config.json and safetensors files, or a .pth file.

    Each tensor is read, converted and put onto ``mesh`` before the next one is read.

    Args:
      mesh: default: one device.
      overrides: fields of the `DecoderConfig` that do not change the weights' shapes, e.g.
        ``dtype="bfloat16"``, ``param_dtype``, ``scan``, ``remat``.

    Raises:
      ConfigError: a missing file, an unsupported architecture or feature, or a tensor that is
        missing, unknown or of a wrong shape; the message names it in one line.
    """
    hf, reader = open_model(Path(source))
    family = family_of(hf)
    config = dataclasses.replace(decoder_config(hf), **overrides)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    stored: dict[str, Any] = flat(shardings(abstract, mesh))
    shapes: dict[str, Any] = flat(abstract)
    needed = {target.name: target for target in targets(family.rows, config, shapes)}
    with ExitStack() as stack:
        stack.enter_context(use_mesh(mesh))
        stack.enter_context(reader)
        names = {_canonical(name, family): name for name in reader.names}
        _check_names(names, needed, family, config)
        arrays: dict[str, jax.Array] = {}
        for target in needed.values():
            parts = _read(reader, names.get(target.name), target, config)
            for path in target.paths:
                part = parts.pop(0).astype(shapes[path].dtype)
                arrays[path] = _put(arrays.get(path), part, target, shapes[path], stored[path])
                del part  # free this tensor before the next one is read
            del parts
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in shapes])


def open_model(source: Path) -> "tuple[dict[str, Any], Reader | PthReader]":
    """The config.json of ``source`` and a reader of its tensors."""
    if source.suffix == SUFFIX:
        reader = PthReader(source)
        return reader.describe(), reader
    return read_object(source / "config.json"), Reader(source)


class Reader:
    """The tensors of a directory of safetensors files, by name, read one at a time."""

    def __init__(self, directory: Path):
        index = directory / "model.safetensors.index.json"
        if index.exists():
            self._files = {k: directory / v for k, v in read_object(index)["weight_map"].items()}
        else:
            single = directory / "model.safetensors"
            check(single.exists(), "directory", str(directory), "must hold model.safetensors")
            self._files = dict.fromkeys(self._open(single).keys(), single)
        for path in set(self._files.values()):
            check(path.exists(), "file", str(path), "is in the index but does not exist")
        self._opened: dict[Path, Any] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self._opened.clear()

    @property
    def names(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, name: str) -> np.ndarray:
        path = self._files[name]
        if path not in self._opened:
            self._opened[path] = self._open(path)
        try:
            return self._opened[path].get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"file={str(path)!r}: {name}: {error}") from None

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"file={str(path)!r}: cannot be read: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file ``path``; raises `ConfigError` if it cannot be read."""
    check(path.parent.is_dir(), "directory", str(path.parent), "does not exist")
    check(path.exists(), "directory", str(path.parent), f"must hold {path.name}")
    return read_json(path)


def _canonical(name: str, family: Family) -> str:
    """``name`` as in the rows: with the family's prefix, which checkpoints without a head lack."""
    name = family.renamed.get(name, name)
    return name if name == family.head or name.startswith(family.prefix) else family.prefix + name


def _check_names(
    names: Mapping[str, str], needed: Mapping[str, Target], family: Family, config: DecoderConfig
) -> None:
    for name in needed:
        exists = name in names or name in family.absent
        check(exists, "tensor", name, "is missing from the checkpoint")
    for name in names:
        known = name in needed or name.endswith(family.ignored)
        # some checkpoints have a copy of the embedding as a tied head
        known = known or (config.tie_embeddings and name == family.head)
        known = known or _beyond(name, family, config.num_layers)
        check(known, "tensor", name, f"is not part of a {family.architecture} with this config")


def _beyond(name: str, family: Family, num_layers: int) -> bool:
    if family.beyond is None or not name.startswith(family.beyond):
        return False
    number = name.removeprefix(family.beyond).split(".")[0]
    return number.isdecimal() and int(number) >= num_layers


def _read(
    reader: "Reader | PthReader", name: str | None, target: Target, config: DecoderConfig
) -> list[np.ndarray]:
    """The tensor called ``name`` in the Decoder's layout: one part for each of ``target.paths``."""
    tensor = np.zeros(target.shape, np.float32) if name is None else reader.read(name)
    check(
        tensor.shape == target.shape,
        f"tensor {target.name}",
        list(tensor.shape),
        f"must have shape {list(target.shape)}",
    )
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
