"""Read JSON by form, and write files and folders completely or not at all."""

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


def read_fields(path: Path, form: Any, remedy: str) -> dict[str, Any]:
    """The object in the JSON file ``path``, which has the ``form`` of `mismatch`.

    Raises:
      ConfigError: it is damaged or has another form; names ``path`` and the ``remedy``.
    """
    try:
        value = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from None
    if fault := mismatch(value, form):
        raise ConfigError(f"file={str(path)!r}: {fault}; {remedy}")
    return value


def read_lines(path: Path, form: Any, remedy: str) -> list[dict[str, Any]]:
    """The objects in the complete lines of ``path``; see `read_fields`."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        origin = f"{path}:{number}"
        try:
            rows.append(parse_json(line.decode(), origin))
        except UnicodeDecodeError as error:
            raise ConfigError(f"file={origin!r}: not JSON: {error}; {remedy}") from None
        except ConfigError as error:
            raise ConfigError(f"{error}; {remedy}") from None
        if fault := mismatch(rows[-1], form):
            raise ConfigError(f"file={origin!r}: {fault}; {remedy}")
    return rows


class Number:
    """The form of a float in JSON: a number, or as `write_json` writes it, the text of one."""


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float, str)):
        return False
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def mismatch(value: Any, form: Any, name: str = "") -> str:
    """What is wrong with ``value``, called ``name``, for its ``form``; empty if nothing is.

    A form is a type (also `Number`), or a tuple of types, lists and None; a set of allowed values;
    a list with the form of all items; a dict from names to forms, all of them required; or
    ``{str: form}`` for any names.
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name or 'the content'} must be an object"
        forms = dict.fromkeys(value, form[str]) if str in form else form
        prefix = f"{name}." if name else ""
        for key, item in forms.items():
            if key not in value:
                return f"{prefix}{key} is missing"
            spelt = key if key.isprintable() and len(key) < 60 else repr(key[:60])
            if fault := mismatch(value[key], item, f"{prefix}{spelt}"):
                return fault
        return ""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} must be a list"
        faults = (mismatch(item, form[0], f"{name}[{i}]") for i, item in enumerate(value))
        return next(filter(None, faults), "")
    if isinstance(form, set):
        allowed = isinstance(value, str) and value in form
        return "" if allowed else f"{name} must be one of {', '.join(sorted(form))}"
    lists = [kind for kind in _several(form) if isinstance(kind, list)]
    if lists and isinstance(value, list):
        return mismatch(value, lists[0], name)
    types = tuple(type(kind) if kind is None else kind for kind in _several(form))
    types = tuple(list if isinstance(kind, list) else kind for kind in types)
    is_bool = isinstance(value, bool) and bool not in types
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{name or 'the content'} must be of at most 64 bits"
    if not is_bool and (isinstance(value, types) or (Number in types and _is_number(value))):
        return ""
    return f"{name or 'the content'} must be {' or '.join(kind.__name__ for kind in types)}"


def _several(form: Any) -> tuple[Any, ...]:
    return form if isinstance(form, tuple) else (form,)


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
      ConfigError: ``directory`` exists and is not empty, before or after it was written.
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
        check_new(directory)  # another process may have been faster
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
