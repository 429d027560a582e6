"""`Reader`: the tensors of a directory of safetensors files, whose headers are read first."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from layers.config import ConfigError, check
from research.files import read_json
from research.models.fields import Fields, short

_LONG = 200  # characters of another library's message
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Reader:
    """The tensors of a directory of safetensors files, by name, read one at a time.

    Raises:
      ConfigError: a file is missing or damaged, the index and the files disagree, or a name is in
        two files; one line that names it. No tensor has been read by then.
    """

    def __init__(self, directory: Path):
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in _files(directory):
            opened = _open(path)
            for name in opened.keys():
                if name in self._files:
                    other = self._files[name][0].name
                    raise ConfigError(f"tensor={short(name)}: is in {other} and in {path.name}")
                self._files[name] = path, opened
        for name, file in _weight_map(directory).items():
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
        tensor = self._files[name][1].get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some of its rows."""
        path, opened = self._files[name]
        try:
            if rows == slice(None):
                return opened.get_tensor(name)
            return opened.get_slice(name)[rows]
        except SafetensorError as error:
            raise ConfigError(f"file={str(path)!r}: {short(name)}: {_line(error)}") from None


def _files(directory: Path) -> list[Path]:
    """The files that hold the model's tensors: one, or those that the index names."""
    present = {path.name for path in directory.iterdir() if path.is_file()}
    named = set(_weight_map(directory).values())
    # transformers would read the one file, and older releases of this project did the opposite
    ambiguous = SINGLE in present and INDEX in present and named != {SINGLE}
    requirement = f"has {SINGLE} and {INDEX}, of other files: remove one of them"
    check(not ambiguous, "directory", str(directory), requirement)
    if not named:
        check(SINGLE in present, "directory", str(directory), f"must hold {SINGLE}")
        named = {SINGLE}
    for name in sorted(named):
        if name not in present:
            raise ConfigError(f"file={short(name)}: is in the index but does not exist")
    return [directory / name for name in sorted(named)]


def _weight_map(directory: Path) -> Mapping[str, str]:
    """Name of a tensor → name of its file; empty if the directory has no index."""
    path = directory / INDEX
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"file={str(path)!r}: cannot be read: {_line(error)}") from None


def _line(error: Exception) -> str:
    """The message in one line; it may quote a whole header."""
    return " ".join(str(error).split())[:_LONG] or type(error).__name__
