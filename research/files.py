"""Write files and folders completely or not at all: to a temporary name, synced, then renamed."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check

_temporaries: set[Path] = set()  # files and folders that are being written


def remove_temporaries() -> None:
    """Remove what is being written: for the end of a process that runs no ``finally``."""
    for path in list(_temporaries):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)``, sync, and rename onto ``path``; a crash leaves the old file.

    Raises:
      OSError: it could not be written; names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    _temporaries.add(temporary)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # otherwise a crash may undo the rename
    except OSError as error:  # for a full disk the system does not name the file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
        _temporaries.discard(temporary)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, see `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as standard JSON; NaN and infinities become strings that `float` can read."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of the JSON file ``path``.

    Raises:
      ConfigError: it is damaged; names ``path``.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"file={str(path)!r}: not JSON: {error}") from None


def parse_json(text: str, origin: Path | str) -> Any:
    """The content of the JSON ``text`` from ``origin``: a file, or a line of it as ``file:number``.

    Raises:
      ConfigError: it is damaged; names ``origin``.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"file={str(origin)!r}: not JSON: {error}") from None
    except RecursionError:
        raise ConfigError(
            f"file={str(origin)!r}: its objects or lists are nested too deep"
        ) from None


def plain(value: Any) -> Any:
    """``value`` in JSON's types: arrays become lists, scalars Python numbers, paths strings."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def check_new(directory: Path) -> None:
    """Raise `ConfigError` unless ``directory`` is absent or empty."""
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    check(not occupied, "directory", str(directory), "must be absent or empty")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``directory`` on success, and deleted on failure.

    Raises:
      ConfigError: ``directory`` exists and is not empty.
      OSError: it could not be written; names the file, or ``directory``.
    """
    check_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    _temporaries.add(fresh)
    try:
        yield fresh
        fresh.chmod(0o755)
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        if directory.exists():
            directory.rmdir()
        os.replace(fresh, directory)
        _sync(directory.parent)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _temporaries.discard(fresh)


def _sync(path: Path) -> None:
    """Wait until the file or folder ``path`` is written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
