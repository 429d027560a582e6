"""A `Decoder` as a Hugging Face directory that transformers loads."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from layers.config import ConfigError, check, check_choice
from layers.decoder import Decoder, DecoderConfig
from research.models.families import FAMILIES, Family
from research.models.table import Target, back, flat, targets

# fields of a DecoderConfig that say how to compute, not what
_EXECUTION = ("scan", "remat", "dtype", "param_dtype", "init_std", "max_length")


def save(model: Decoder, directory: Path | str, family: str, *, shard_bytes: int = 4 << 30) -> None:
    """Write ``model`` to ``directory`` as a checkpoint of ``family``, in its parameters' dtype.

    Files hold up to ``shard_bytes`` (or one tensor), with an index if there are several. The
    directory appears whole or not at all.

    Raises:
      ConfigError: an unknown family, a model the family cannot express (the field is named), or a
        directory that is not empty.
    """
    check_choice("family", family, FAMILIES)
    check(shard_bytes > 0, "shard_bytes", shard_bytes, "must be > 0")
    directory = Path(directory)
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    check(not occupied, "directory", str(directory), "is there and not empty")
    chosen = FAMILIES[family]
    config, parameters = model.config, flat(model)
    described = _describe(config, chosen)
    wanted = targets(chosen.rows, config, parameters)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write_tensors(fresh, wanted, config, parameters, shard_bytes)
        (fresh / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        fresh.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        os.replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _describe(config: DecoderConfig, family: Family) -> dict:
    """config.json, after checking that it says all that ``config`` does."""
    described = family.write(config)
    again = dataclasses.asdict(family.read(described))
    ours = dataclasses.asdict(_explicit(config))
    for field in ours:
        if field not in _EXECUTION and ours[field] != again[field]:
            raise ConfigError(
                f"{field}={ours[field]!r}: a {family.architecture} would have {again[field]!r}"
            )
    dtype = config.param_dtype
    kind = {"architectures": [family.architecture], "model_type": family.model_type}
    return {**kind, "dtype": dtype, "torch_dtype": dtype, **described}


def _explicit(config: DecoderConfig) -> DecoderConfig:
    """``config`` with what is implied written out, as checkpoints do."""
    attention = config.part("attention")
    attention = dataclasses.replace(
        attention,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.channels(config.width),
        window=attention.window if "sliding" in config.pattern else None,
    )
    return dataclasses.replace(config, attention=attention)


def _write_tensors(
    directory: Path,
    wanted: list[Target],
    config: DecoderConfig,
    parameters: dict[str, jax.Array],
    shard_bytes: int,
) -> None:
    shards: list[list[Target]] = [[]]
    held = 0
    for target in wanted:
        item = parameters[target.paths[0]].dtype.itemsize
        size = int(np.prod(target.shape)) * item
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(target)
        held += size
    count = len(shards)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if count > 1:
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {t.name: _tensor(t, config, parameters) for t in shard}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tensor(target: Target, config: DecoderConfig, parameters: dict[str, jax.Array]) -> np.ndarray:
    parts = [parameters[path] for path in target.paths]
    if target.index is not None:
        parts = [part[target.index] for part in parts]
    host = [np.asarray(part) for part in parts]
    ours = host[0] if len(host) == 1 else np.stack(host)
    return np.ascontiguousarray(back(target.pattern, ours, config))
