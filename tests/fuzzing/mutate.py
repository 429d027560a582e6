"""Mutations of files: of bytes, of JSON, and of the header of a safetensors file."""

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

_DEEP = "@deep@"  # replaced by nested lists in the text, which are too deep for `json.dumps`
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**15, 2**31 - 1, 2**31, 2**63, -(2**63), 10**9,
    10**20, 10**400, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
    -float("inf"), "", "2", "true", "null", "nan", "auto", "../a", "/etc/passwd", "a\nb", "\0",
    "\ud800", "é" * 50, "a" * 5000, [], [[]], [1, 2], ["a"], [None], [0.0, 1e9], {}, {"a": 1},
    {"": None}, {"__float__": "NaN"}, _DEEP,
)  # fmt: skip


def mutated(
    rng: random.Random, seeds: Sequence[bytes], words: Sequence[str], codec: "Codec"
) -> bytes:
    """One of ``seeds`` with one to three mutations; ``words`` are texts of the format."""
    content = rng.choice(seeds)
    if rng.random() < 0.75:
        return codec(rng, content, lambda value: _structure(rng, value, words))
    for _ in range(rng.randint(1, 3)):
        content = _bytes(rng, content, rng.choice(seeds))
    return content


# changes the structured parts of a file's content
Codec = Callable[[random.Random, bytes, Callable[[Any], Any]], bytes]


def of_json(rng: random.Random, content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A file that is one JSON value."""
    return dumps(rng, change(json.loads(content)))


def of_lines(rng: random.Random, content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A file with a JSON value in each line."""
    lines = content.splitlines()
    row = rng.randrange(len(lines))
    lines[row] = dumps(rng, change(json.loads(lines[row])))
    return b"\n".join(lines) + b"\n"


def of_safetensors(rng: random.Random, content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file: the length of its header in 8 bytes, the header in JSON, the data."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header = dumps(rng, _alike(rng, header) if rng.random() < 0.3 else change(header))
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + content[8 + length :]


def _alike(rng: random.Random, header: Any) -> Any:
    """``header`` of a valid file of the same size, with other types, shapes or names."""
    names = list(header)
    for name in rng.sample(names, min(len(names), 3)):
        tensor = header[name]
        match rng.randrange(4) if isinstance(tensor, dict) and "shape" in tensor else 3:
            case 0:
                tensor["dtype"] = rng.choice(("I32", "U32", "F32"))
            case 1:
                tensor["shape"] = tensor["shape"][::-1]
            case 2:
                tensor["shape"] = [1, *tensor["shape"]]
            case _:
                header[rng.choice(("a\n", name * 50, "model." + name, "lm_head.weight"))] = (
                    header.pop(name)
                )
    return header


def dumps(rng: random.Random, value: Any) -> bytes:
    """``value`` in JSON, in which nan and lone surrogates are kept."""
    depth = rng.choice((100, 2_000, 200_000))
    open_, close = rng.choice((("[", "]"), ('{"a":', "}")))
    text = json.dumps(value)
    if json.dumps(_DEEP) in text:
        text = text.replace(json.dumps(_DEEP), open_ * depth + "1" + close * depth)
    return text.encode()


def _structure(rng: random.Random, value: Any, words: Sequence[str]) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _change(rng, value, words)
    return value


def _change(rng: random.Random, value: Any, words: Sequence[str]) -> Any:
    """``value`` with one element, at any depth, replaced, deleted, added or renamed."""
    containers = list(_containers(value))
    if not containers or rng.random() < 0.01:
        return _other(rng, value, words)
    container = rng.choice(containers)
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    action = rng.choice(("replace", "replace", "replace", "delete", "add", "rename", "copy"))
    if action == "add" or not keys:
        new = _other(rng, None, words)
        if isinstance(container, dict):
            container[rng.choice(words)] = new
        else:
            container.insert(rng.randint(0, len(container)), new)
        return value
    key = rng.choice(keys)
    if action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice((*words, "", "a\nb"))] = container.pop(key)
    elif action == "copy":
        container[key] = copy.deepcopy(container[rng.choice(keys)])
    else:
        container[key] = _other(rng, container[key], words)
    return value


def _containers(value: Any):
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _other(rng: random.Random, value: Any, words: Sequence[str]) -> Any:
    near: list[Any] = [[value], {"a": value}, str(value)]
    if isinstance(value, (int, float)):
        near += [value + 1, value - 1, 2 * value, -value, value * 10**6]
        near += [int(value), float(value)] if abs(value) < 1e300 else []
    if isinstance(value, str):
        near += [value + "a", value[:-1], value.upper(), value * 100]
    if isinstance(value, list):
        near += [value * 2, value[:-1], value[::-1], value * 1000]
    return copy.deepcopy(rng.choice((rng.choice(_VALUES), rng.choice(near), rng.choice(words))))


def _bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """``content`` with bytes flipped, deleted, doubled, inserted, cut, or joined with ``other``."""
    start = rng.randint(0, len(content))
    stop = min(len(content), start + rng.choice((1, 2, 8, 100)))
    middle = content[start:stop]
    match rng.randrange(7):
        case 0:
            return (
                content[:start]
                + bytes(b ^ (1 << rng.randrange(8)) for b in middle)
                + content[stop:]
            )
        case 1:
            return content[:start] + content[stop:]
        case 2:
            return content[:stop] + middle * rng.choice((1, 100)) + content[stop:]
        case 3:
            return content[:start] + rng.randbytes(stop - start + 1) + content[start:]
        case 4:
            return content[:start]
        case 5:
            return content[:start] + other[rng.randint(0, len(other)) :]
        case _:
            spots = (
                b"\0",
                b"\xff",
                b"{",
                b"}",
                b"[",
                b'"',
                b",",
                b"9" * 20,
                b"e9",
                b"\xef\xbb\xbf",
            )
            return content[:start] + rng.choice(spots) + content[stop:]
