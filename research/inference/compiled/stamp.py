"""The stamp of compiled programs: everything that decides whether they may run here.

Two parts. ``source``: what is computed, by which code, of weights of which shapes. ``machine``: the
versions, devices and flags that an executable is compiled for, and that a portable program is not.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax import export

import layers
import pallas_kernels
from layers.config import ConfigError, check
from layers.weights import flat
from research.files import mismatch, parse_json, plain

STAMP = "stamp.json"
FORMAT = 1
EXECUTABLE, PORTABLE = "executable", "portable"  # suffixes of files, and their names in a stamp
_FILE = {"bytes": int, "sha256": str}
_FORM = {
    "source": dict,
    "machine": dict,
    "programs": {str: {"arguments": str, EXECUTABLE: _FILE, PORTABLE: _FILE}},
}
_MOST = 64 << 20  # bytes of a stamp
_AGAIN = "compile it again"
_CODE = (
    *(Path(str(package.__file__)).parent for package in (layers, pallas_kernels)),
    *(Path(__file__).parents[2] / room for room in ("inference", "parallel")),
)
_COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")


def make_stamp(weights: Any, configs: Mapping[str, Any], devices: Sequence[Any]) -> dict[str, Any]:
    """The stamp of programs for ``weights`` and ``configs`` on ``devices``, in JSON's types.

    Args:
      weights: a pytree of arrays or `jax.ShapeDtypeStruct`. Paths, shapes, dtypes and shardings
        count; values do not.
      configs: name → a dataclass that the programs depend on.
      devices: in the order of the mesh; they may be those of a topology.
    """
    source = {
        "format": FORMAT,
        "platform": lowering_platform(devices[0]),
        "devices": len(devices),
        "x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "code": _code(),
        **{name: dataclasses.asdict(config) for name, config in configs.items()},
        "weights": {path: spell(leaf) for path, leaf in flat(weights).items()},
    }
    return plain({"source": source, "machine": _machine(devices)})


def lowering_platform(device: Any) -> str:
    """The platform of ``device`` as lowering names it: ``cpu``, ``tpu``, ``cuda`` or ``rocm``."""
    return export.default_export_platform() if device.platform == "gpu" else device.platform


def spell(leaf: Any) -> str:
    """Dtype, shape and sharding of an array, e.g. ``float32[64,32] P('embed') over tensor=2``."""
    text = f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
        axes = {name: size for name, size in sharding.mesh.shape.items() if size > 1}
        text += f" {sharding.spec} over {','.join(f'{name}={n}' for name, n in axes.items())}"
    return text


def read_stamp(
    path: Path, stamp: Mapping[str, Any], signatures: Mapping[str, str], portable: bool
) -> tuple[bytes, dict[str, Any]]:
    """The content of the file ``path``, and what it says of each program's files.

    Args:
      stamp: that of this process, see `make_stamp`.
      signatures: name → a hash of the arguments of each program that is required.
      portable: do not compare ``machine``.

    Raises:
      ConfigError: it is absent or damaged, or a field differs: names it, and both values.
    """
    check(path.is_file(), "file", str(path), "does not exist: `ablate compile` writes it")
    size = path.stat().st_size
    check(size <= _MOST, "file", str(path), f"must be of at most {_MOST} bytes")
    content = path.read_bytes()
    try:
        stored = parse_json(content.decode(), path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"file={str(path)!r}: not JSON: {error}") from None
    if fault := mismatch(stored, _FORM):
        raise ConfigError(f"file={str(path)!r}: {fault}; {_AGAIN}")
    remedies = {"source": _AGAIN, "machine": f"{_AGAIN}, or load its portable programs"}
    for part in ("source",) if portable else ("source", "machine"):
        for name, there, here in differences(stored[part], stamp[part], part):
            _refuse(name, there, here, path, remedies[part])
    found = {name: item["arguments"] for name, item in stored["programs"].items()}
    for name, there, here in differences(found, dict(signatures), "programs"):
        _refuse(name, there, here, path, _AGAIN)
    return content, stored["programs"]


_ABSENT = object()


def differences(theirs: Any, ours: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The dotted path and both values of each part in which two JSON values differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in dict.fromkeys((*ours, *theirs)):
            yield from differences(
                theirs.get(name, _ABSENT), ours.get(name, _ABSENT), f"{path}.{name}"
            )
    elif type(theirs) is not type(ours) or theirs != ours:  # True == 1 in Python
        if isinstance(theirs, list) and isinstance(ours, list) and len(ours) > 3:
            # of long lists, such as the features of a processor, only what the other lacks
            theirs, ours = (
                [item for item in theirs if item not in ours],
                [item for item in ours if item not in theirs],
            )
        yield path, theirs, ours


def _refuse(name: str, there: Any, here: Any, path: Path, remedy: str) -> NoReturn:
    def show(value: Any) -> str:
        text = "absent" if value is _ABSENT else ascii(value)
        return text if len(text) <= 200 else f"{text[:200]}…"

    shown, folder = ascii(name)[1:-1][:200], str(path.parent)
    raise ConfigError(f"{shown}={show(here)}: {folder!r} has {show(there)}; {remedy}")


def _machine(devices: Sequence[Any]) -> dict[str, Any]:
    first = devices[0]
    coords = [getattr(device, "coords", None) for device in devices]
    machine = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": first.device_kind,
        "ids": [device.id for device in devices],
        # of a TPU slice: the coordinates of its chips
        "topology": None if None in coords else [list(c) for c in coords if c is not None],
        "compiler": [f"{name} {version}" for name, version in _compilers(first.platform)],
        "flags": {
            name: sorted(os.environ.get(name, "").split())
            for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
        },
    }
    if first.platform == "cpu":
        # XLA compiles for all of these, and loads an executable without checking that they exist
        machine |= {"machine": platform.machine(), "features": _features()}
    return machine


def _compilers(platform_name: str) -> Iterator[tuple[str, str]]:
    """Name and version of the packages that compile for a platform other than the CPU."""
    for name in _COMPILERS if platform_name != "cpu" else ():
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _features() -> list[str]:
    """The features of the host's processor, where Linux names them; otherwise its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(value.split())
    return [platform.processor()]


def _code() -> str:
    """SHA-256 of the files that programs are traced from, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("blocks.json"))):
            name = str(path.relative_to(folder.parent))
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
