"""`Fields`: typed reads of the fields of a JSON object, which remember what was read."""

import math
import reprlib
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, NoReturn

from layers.config import ConfigError
from pallas_kernels.names import one_of

REQUIRED: Final = object()  # no default: the field must be there
LARGEST: Final = 2**31 - 1  # array sizes, and what int32 holds
_LONG = 60  # characters: longer names are cut, and for longer values no similar one is suggested

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxstring = 3, 6, 6, 80


class Fields:
    """The fields of a JSON object, each read by its type.

    A field's ``default`` is its value if it is absent; without one the field is required. ``null``
    is its value if it is null. As in transformers, null does not mean the default: it is refused
    unless ``null`` is given, or the default is None.

    Args:
      values: a parsed JSON object.
      where: the prefix of the fields' names in errors, such as ``"rope_parameters."``.

    Raises:
      ConfigError: in every method, if the field is missing or its value is not allowed; one line
        that names it.
    """

    def __init__(self, values: Any, where: str = ""):
        self._where, self._read = where, set[str]()
        self._objects: dict[str, Fields] = {}
        if not isinstance(values, Mapping):
            name = where.removesuffix(".") or "the file"
            raise ConfigError(f"{name}={short(values)}: must be an object")
        self.values: Mapping[str, Any] = values

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def __bool__(self) -> bool:
        return bool(self.values)

    def integer(
        self,
        name: str,
        default: Any = REQUIRED,
        *,
        null: Any = REQUIRED,
        at_least: int = 1,
        at_most: int = LARGEST,
    ) -> Any:
        """An int in ``at_least … at_most``; 4.0, "4" and true are refused."""
        value, given = self._take(name, default, null)
        if given:
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._check(whole, name, value, "must be an integer")
            self._check(value >= at_least, name, value, f"must be ≥ {at_least}")
            self._check(value <= at_most, name, value, f"must be ≤ {at_most}")
        return value

    def number(
        self,
        name: str,
        default: Any = REQUIRED,
        *,
        null: Any = REQUIRED,
        above: float = -math.inf,
        at_least: float = -math.inf,
        below: float = math.inf,
    ) -> Any:
        """A finite float; an integer is one, "4" and true are not."""
        value, given = self._take(name, default, null)
        if not given:
            return value
        self._check(_is_number(value), name, value, "must be a number")
        self._check(is_finite(value), name, value, "must be finite")
        self._check(value > above, name, value, f"must be > {above:g}")
        self._check(value >= at_least, name, value, f"must be ≥ {at_least:g}")
        self._check(value < below, name, value, f"must be < {below:g}")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED, *, null: Any = REQUIRED) -> Any:
        """A bool; 0 and 1 are refused."""
        value, given = self._take(name, default, null)
        if given:
            self._check(isinstance(value, bool), name, value, "must be true or false")
        return value

    def text(
        self,
        name: str,
        default: Any = REQUIRED,
        *,
        choices: Collection[str] = (),
        null: Any = REQUIRED,
    ) -> Any:
        """A str, one of ``choices`` if there are any."""
        value, given = self._take(name, default, null)
        if given:
            self._check(isinstance(value, str), name, value, "must be a text")
            if choices and value not in choices:
                near = value if len(value) < _LONG else ""
                self.refuse(name, value, f"must be {one_of(near, choices)}")
        return value

    def texts(
        self, name: str, default: Any = REQUIRED, *, count: int | None = None, null: Any = REQUIRED
    ) -> Any:
        """A list of names, of ``count`` elements if it is given."""
        value, given = self._take(name, default, null)
        if given:
            self._check(isinstance(value, list), name, value, "must be a list of texts")
            for i, item in enumerate(value):
                named = isinstance(item, str) and len(item) < _LONG
                self._check(named, f"{name}[{i}]", item, "must be a name")
            right = count is None or len(value) == count
            self._check(right, name, value, f"must have {count} elements, not {len(value)}")
        return value

    def items(self, name: str, default: Any = REQUIRED) -> Any:
        """A list; its elements are not checked."""
        value, given = self._take(name, default, REQUIRED)
        if given:
            self._check(isinstance(value, (list, tuple)), name, value, "must be a list")
        return value

    def object(self, name: str) -> "Fields":
        """The fields of an object; none if it is absent or null."""
        if name not in self._objects:
            value, _ = self._take(name, {}, {})
            self._objects[name] = Fields(value, f"{self._where}{name}.")
        return self._objects[name]

    def only(self, **supported: Any) -> None:
        """Refuse each of these fields unless it is absent or has this value, of the same type."""
        for name, value in supported.items():
            actual, _ = self._take(name, value, None)
            same = actual == value and isinstance(actual, bool) == isinstance(value, bool)
            self._check(same, name, actual, f"must be {_json(value)}")

    def unused(self, name: str) -> Any:
        """The value of a field that is not applied, or None; it counts as read."""
        return self._take(name, None, None)[0]

    def same(self, name: str, other: str) -> None:
        """Refuse two names of one thing that are both given and differ."""
        values = self.unused(name), self.unused(other)
        if None not in values and values[0] != values[1]:
            self.refuse(name, values[0], f"must be {self._where}{other}={short(values[1])}")

    def unread(self) -> Iterator[tuple[str, Any]]:
        """The name, with its prefix, and the value of each field that no method has read."""
        for name, value in self.values.items():
            if name in self._objects:
                yield from self._objects[name].unread()
            elif name not in self._read:
                yield f"{self._where}{name}", value

    def read_all(self) -> None:
        """Count every field as read, e.g. of an object that is equal to another one."""
        self._read.update(self.values)

    def refuse(self, name: str, value: Any, requirement: str) -> NoReturn:
        """Raise `ConfigError`, ``field=value: requirement``; a long value is cut."""
        raise ConfigError(f"{self._where}{spelt(name)}={short(value)}: {requirement}")

    def _take(self, name: str, default: Any, null: Any) -> tuple[Any, bool]:
        """The value, and whether it is that of the file and must be checked."""
        self._read.add(name)
        if name not in self.values:
            if default is REQUIRED:
                raise ConfigError(f"{self._where}{spelt(name)}: is missing")
            return default, False
        value = self.values[name]
        if value is None and null is REQUIRED:
            null = default
            self._check(default is None, name, None, "must not be null")
        return (null, False) if value is None else (value, True)

    def _check(self, condition: bool, name: str, value: Any, requirement: str) -> None:
        if not condition:
            self.refuse(name, value, requirement)


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number that float64 holds: no NaN, infinity or longer integer."""
    return _is_number(value) and abs(value) <= sys.float_info.max  # false for NaN


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short(value: Any) -> str:
    """``repr(value)`` in one line, cut if it is long."""
    return _short.repr(value)


def spelt(name: str) -> str:
    """A field's name as it is, or quoted and cut if it does not fit in a line."""
    return name if name.isprintable() and len(name) < _LONG else short(name[:_LONG])


def _json(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
