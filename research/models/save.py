"""Saves a `Decoder` as a Hugging Face directory for transformers, or as an RWKV-7 file."""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from layers.architecture import FEED_FORWARDS, MIXERS
from layers.config import (
    EXECUTION,
    PRECISION,
    TRAINING,
    ConfigError,
    check,
    check_choice,
    decides,
)
from layers.decoder import Decoder, DecoderConfig
from layers.rwkv import RwkvConfig
from layers.weights import dense, flat
from research.files import check_new, new_directory
from research.models.companions import TOKEN_IDS, copy_companions, family_name
from research.models.families import FAMILIES, Family, text_config
from research.models.families.family import shortest
from research.models.fields import Fields
from research.models.load import read_object
from research.models.pth import SUFFIX, write_pth
from research.models.table import Target, targets, to_theirs

# a Decoder has no special tokens; the defaults of transformers would be those of another model
_NO_TOKENS = dict.fromkeys(TOKEN_IDS)


def save(
    model: Decoder,
    directory: Path | str,
    family: str,
    *,
    shard_bytes: int = 4 << 30,
    source: Path | None = None,
) -> None:
    """Write ``model`` to ``directory`` as a checkpoint of ``family``, in its parameters' dtype.

    A file has up to ``shard_bytes`` (or one tensor); several files have an index. The directory
    is written atomically. If ``directory`` ends in ``.pth``, it is one file of RWKV-7's authors'
    format, and the whole model is in memory while it is written.

    Args:
      source: a directory like `ORIGIN`: its `COMPANIONS` (the tokenizer, …) are copied, and fields
        of its config.json that do not describe the weights are kept: all if it is of ``family``,
        else the ids of special tokens.

    Raises:
      ConfigError: an unknown family, a model that the family does not support (the message names
        the field) or that is sharded over several processes, or a directory that is not empty.
    """
    check_choice("family", family, FAMILIES)
    check(shard_bytes > 0, "shard_bytes", shard_bytes, "must be > 0")
    directory = Path(directory)
    check_new(directory)
    chosen = FAMILIES[family]
    config = model.config
    parameters = flat(dense(model, jnp.dtype(config.param_dtype)))
    for path, array in parameters.items():
        whole = getattr(array, "is_fully_addressable", True)
        check(whole, "parameter", path, "must be on the devices of this process")
    described = _describe(config, chosen, _kept(source, family) if source else {})
    tensors = targets(chosen.rows, config, parameters)
    if directory.suffix == SUFFIX:
        check(family == "rwkv7", "family", family, f"a {SUFFIX} file requires family rwkv7")
        write_pth({t.name: _tensor(t, config, parameters) for t in tensors}, directory)
        return
    with new_directory(directory) as fresh:
        if source:
            copy_companions(source, fresh)
        _write_tensors(fresh, tensors, config, parameters, shard_bytes)
        (fresh / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _kept(source: Path, family: str) -> dict[str, Any]:
    """The fields of the config.json in ``source`` that `save` keeps."""
    hf = read_object(source / "config.json")
    token_ids = {name: hf[name] for name in TOKEN_IDS if name in hf}
    return {**text_config(hf), **token_ids} if family_name(source) == family else token_ids


def _describe(config: DecoderConfig, family: Family, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of ``config``, after checking that reading it gives ``config`` again."""
    described = {**kept, **family.write(config)}
    # weights are written as numbers
    described.pop("quantization_config", None)
    read_back = _normalised(family.read(Fields(described)))
    # the weights do not depend on the length
    lengths = {"max_length", "rotary.scaling.length", "sliding_rotary.scaling.length"}
    unchecked = {*decides(config, EXECUTION, PRECISION, TRAINING), *lengths}
    for field, value in _normalised(config).items():
        if field not in unchecked and value != read_back.get(field):
            raise ConfigError(
                f"{field}={value!r}: a {family.architecture} would have {read_back.get(field)!r}"
            )
    dtype = config.param_dtype
    kind = {"architectures": [family.architecture], "model_type": family.model_type}
    return {**_NO_TOKENS, **described, **kind, "dtype": dtype, "torch_dtype": dtype}


def _normalised(config: DecoderConfig) -> dict[str, Any]:
    """Dotted field → value, equal for configurations that mean the same."""
    mixers, feed_forwards = zip(*config.layers, strict=True)
    kinds = {"pattern": shortest(mixers), "feed_forward": shortest(feed_forwards)}
    # kinds first: if they differ, other fields differ too
    return {**kinds, **dict(_fields(dataclasses.asdict(_explicit(config)))), **kinds}


def _fields(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of nested fields."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _explicit(config: DecoderConfig) -> DecoderConfig:
    """``config`` with its defaults written out, and without parts that no layer has."""
    attention, sliding_rotary = config.attention, config.sliding_rotary
    latent, mamba, moe, rwkv = config.latent, config.mamba, config.moe, config.rwkv
    if attention is not None:
        channels = attention.channels(config.width)
        attention = dataclasses.replace(
            attention,
            num_kv_heads=attention.kv_heads,
            head_dim=channels,
            scale=channels**-0.5 if attention.scale is None else attention.scale,
        )
    if latent is not None:
        scale = latent.scale or (latent.head_dim + latent.rotary_dim) ** -0.5
        norm_eps = latent.norm_eps or config.norm_eps
        latent = dataclasses.replace(latent, scale=scale, norm_eps=norm_eps)
    if mamba is not None:
        used_fields = dict(delta_rank=mamba.rank(config.width)) if "mamba" in config.pattern else {}
        if "mamba2" in config.pattern:
            used_fields |= dict(head_dim=mamba.head_dim, groups=mamba.groups)
        unused = dict(delta_rank=None, head_dim=64, groups=1)
        mamba = dataclasses.replace(mamba, **(unused | used_fields))
    if rwkv is not None and "rwkv7" not in config.pattern:
        # RWKV-4 has no other sizes
        rwkv = RwkvConfig(
            channels=rwkv.channels or config.width, rescale_every=rwkv.rescale_every
        )  # fmt: skip
    if "sliding" in config.pattern:
        sliding_rotary = sliding_rotary or config.rotary
    parts: dict[str, Any] = dict(
        attention=attention, latent=latent, mamba=mamba, mlp=config.mlp, moe=moe, rwkv=rwkv
    )
    used = {MIXERS[mixer] for mixer, _ in config.layers}
    used |= {FEED_FORWARDS[feed_forward] for _, feed_forward in config.layers}
    parts = {name: part if name in used else None for name, part in parts.items()}
    eps = None if config.norm_position == "post" else config.final_norm_eps or config.norm_eps
    return dataclasses.replace(config, sliding_rotary=sliding_rotary, final_norm_eps=eps, **parts)


def _write_tensors(
    directory: Path,
    pending: list[Target],
    config: DecoderConfig,
    parameters: dict[str, jax.Array],
    shard_bytes: int,
) -> None:
    shards: list[list[Target]] = [[]]
    filled = 0
    for target in pending:
        item = parameters[target.paths[0]].dtype.itemsize
        size = int(np.prod(target.shape)) * item
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(target)
        filled += size
    count = len(shards)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if count > 1:
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {t.name: _tensor(t, config, parameters) for t in shard}
        total += sum(tensor.nbytes for tensor in tensors.values())
        _save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_file(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write ``tensors``; a full disk is an `OSError` that names ``path``, as for other files."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None


def _tensor(target: Target, config: DecoderConfig, parameters: dict[str, jax.Array]) -> np.ndarray:
    host = [_on_host(parameters[path], target.index) for path in target.paths]
    return np.ascontiguousarray(to_theirs(target.row, host, config))


def _on_host(array: jax.Array | np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """``array[index]`` on the host, from the devices that hold its shards, over any axis."""
    if isinstance(array, np.ndarray):
        return array[index]
    result = np.empty(array.shape[len(index) :], array.dtype)
    for shard in array.addressable_shards:
        first, spans = shard.index[: len(index)], shard.index[len(index) :]
        starts = [axis.start or 0 for axis in first]
        position = tuple(i - start for i, start in zip(index, starts, strict=True))
        inside = all(0 <= i < n for i, n in zip(position, shard.data.shape, strict=False))
        if inside and shard.replica_id == 0:
            result[spans] = np.asarray(shard.data[position])
    return result
