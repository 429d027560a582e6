"""`Reader`: the tensors of a directory of weights, whose headers are read first."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from layers.config import ConfigError, check
from research.files import read_json
from research.models.fields import Fields, short
from research.models.pickled import PickledFile

_LONG = 200  # characters of another library's message
# a file of weights; with ``.index.json``, an index of several. The first that exists is read.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Reader:
    """The tensors of a directory, by name, read one at a time.

    They are in safetensors files, or in files that PyTorch pickled.

    Raises:
      ConfigError: a file is missing or damaged, the index and the files disagree, or a name is in
        two files; one line that names it. No tensor has been read by then.
    """

    def __init__(self, directory: Path):
        self._files: dict[str, tuple[Path, SafeFile | PickledFile]] = {}
        single = _weights(directory)
        for path in _files(directory, single):
            opened = SafeFile(path) if path.suffix == ".safetensors" else PickledFile(path)
            for name in opened.keys():
                if name in self._files:
                    other = self._files[name][0].name
                    raise ConfigError(f"tensor={short(name)}: is in {other} and in {path.name}")
                self._files[name] = path, opened
        for name, file in _weight_map(directory, single).items():
            exists = name in self._files and self._files[name][0].name == file
            if not exists:
                requirement = f"is not in {file}, where the index has it"
                raise ConfigError(f"tensor={short(name)}: {requirement}")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self._files.clear()

    @property
    def names(self) -> Iterator[str]:
        return iter(self._files)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """The tensor's shape and dtype (``F32``, ``BF16``, …)."""
        return self._files[name][1].header(name)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its rows."""
        return self._files[name][1].read(name, rows)


class SafeFile:
    """The tensors of a safetensors file; raises `ConfigError` if it cannot be read."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file: Any = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"file={str(path)!r}: cannot be read: {_line(error)}") from None

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._file.keys())

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """The tensor's shape and dtype."""
        tensor = self._file.get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its rows."""
        if self.header(name)[1] == "F8_E4M3":  # safetensors has no array of it for NumPy
            return _read_fp8(self._path, name)[rows]
        try:
            if rows == slice(None):
                return self._file.get_tensor(name)
            return self._file.get_slice(name)[rows]
        except SafetensorError as error:
            raise ConfigError(f"file={str(self._path)!r}: {short(name)}: {_line(error)}") from None


def _read_fp8(path: Path, name: str) -> np.ndarray:
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_size))[name]
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    bits = np.fromfile(path, np.uint8, end - begin, offset=8 + header_size + begin)
    return bits.view(jnp.float8_e4m3fn).reshape(shape)


def _weights(directory: Path) -> str:
    """The name in `WEIGHTS` of the file, or of the index, that ``directory`` has."""
    for name in WEIGHTS:
        if (directory / name).is_file() or (directory / _index(name)).is_file():
            return name
    raise ConfigError(f"directory={str(directory)!r}: must hold {' or '.join(WEIGHTS)}")


def _index(single: str) -> str:
    return f"{single}.index.json"


def _files(directory: Path, single: str) -> list[Path]:
    """The files that hold the model's tensors: one, or those that the index names."""
    present = {path.name for path in directory.iterdir() if path.is_file()}
    named = set(_weight_map(directory, single).values())
    # transformers would read the one file, and older releases of this project did the opposite
    ambiguous = single in present and _index(single) in present and named != {single}
    requirement = f"has {single} and {_index(single)}, of other files: remove one of them"
    check(not ambiguous, "directory", str(directory), requirement)
    named = named or {single}
    for name in sorted(named):
        if name not in present:
            raise ConfigError(f"file={short(name)}: is in the index but does not exist")
    return [directory / name for name in sorted(named)]


def _weight_map(directory: Path, single: str) -> Mapping[str, str]:
    """Name of a tensor → name of its file; empty if the directory has no index."""
    path = directory / _index(single)
    if not path.is_file():
        return {}
    try:
        return weight_map(read_json(path))
    except ConfigError as error:
        named = str(error).startswith("file=")
        raise error if named else ConfigError(f"file={str(path)!r}: {error}") from None


def weight_map(index: Any) -> Mapping[str, str]:
    """The checked ``weight_map`` of the content of an index.

    Raises:
      ConfigError: it is not an object of names of tensors and of files in the same directory.
    """
    fields = Fields(index).object("weight_map")
    check(bool(fields), "weight_map", {}, "must name the file of each tensor")
    files = {name: fields.text(name) for name in fields.values}
    for name, file in files.items():
        if Path(file).name != file:
            fields.refuse(name, file, "must be the name of a file in the directory")
    return files


def _line(error: Exception) -> str:
    """The message in one line; it may quote a whole header."""
    return " ".join(str(error).split())[:_LONG] or type(error).__name__
