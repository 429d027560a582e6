"""The collectives of a compiled program, read from its HLO text.

A collective in the body of a loop counts once per iteration, so that a scan over layers shows what
a step sends.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "bf16": 2}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# the called computations that run once per run of the caller
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+))"
)
_WHILE = re.compile(r"\bcondition=%([\w.\-]+), body=%([\w.\-]+)")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")


class Collective(NamedTuple):
    """One collective of a program.

    ``size``: bytes per device of the full array that is gathered, reduced or exchanged. ``ways``:
    devices in each group. ``times``: how often one run of the program runs it. ``depth``: the
    number of loops around it. ``shapes``: of its results, as HLO writes them.
    """

    kind: str
    size: int
    ways: int
    times: int
    depth: int
    shapes: tuple[str, ...]

    @property
    def moved(self) -> float:
        """Bytes that each device sends in total, around a ring (no algorithm sends fewer)."""
        share = (self.ways - 1) / self.ways if self.ways > 1 else 0.0
        once = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return once * self.size * self.times

    @property
    def numbers(self) -> float:
        """`moved`, in elements of the array instead of bytes."""
        arrays = [(_size(shape), _elements(shape)) for shape in self.shapes]
        return self.moved * sum(n for _, n in arrays) / sum(size for size, _ in arrays)


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of the HLO module ``text``, compiled for ``devices``.

    Raises:
      ValueError: a collective is in a loop whose number of iterations the program does not give.
    """
    computations, entry = _computations(text)
    result: list[Collective] = []

    def visit(name: str, times: int | None, depth: int) -> None:
        # XLA for TPUs fuses an all-reduce and the slicing of its result into a reduce-scatter
        scattered = name.startswith("all-reduce-scatter")
        for line_name, line in computations[name]:
            operation = _operation(line)
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                collective = _collective(kind, operation, line, devices, scattered)
                if collective.ways > 1:
                    if times is None:
                        raise ValueError(f"{line_name}: in a loop of unknown length")
                    result.append(collective._replace(times=times, depth=depth))
            elif operation == "while":
                condition, body = _only(_WHILE.search(line)).groups()
                trips = _trips(line, computations[condition])
                inside = None if times is None or trips is None else times * trips
                visit(body, inside, depth + 1)
            elif not _continues(line_name, line):
                for called in _calls(line):
                    visit(called, times, depth)

    visit(entry, 1, 0)
    return result


def count(found: list[Collective], *, above: int = 0) -> dict[str, int]:
    """Kind → how many times collectives of more than ``above`` bytes run."""
    counts: dict[str, int] = defaultdict(int)
    for collective in found:
        if collective.size > above:
            counts[collective.kind] += collective.times
    return dict(counts)


def _computations(text: str) -> tuple[Mapping[str, list[tuple[str, str]]], str]:
    """Name → instructions as (name, text after the equals sign); and the name of the entry."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = header.group(2)
            computations[inside] = []
            entry = inside if header.group(1) else entry
        elif inside is not None and (instruction := _INSTRUCTION.match(line)):
            computations[inside].append((instruction.group(1), instruction.group(2)))
    return computations, entry


def _operation(line: str) -> str:
    """``all-gather`` of ``f32[8]{0:T(8,128)} all-gather(…)``: before a bracket, and no layout."""
    match = _OPERATION.search(line)
    return match.group(1) if match else ""


def _collective(kind: str, operation: str, line: str, devices: int, scattered: bool) -> Collective:
    results, _, operands = line.partition(f"{operation}(")
    shapes = [f"{dtype}[{sizes}]" for dtype, sizes in _ARRAY.findall(results)]
    if operation == "all-gather-start" or operation == "collective-permute-start":
        shapes = shapes[len(shapes) // 2 :] if operation[4] == "g" else shapes[1:2]
    ways = _ways(operands, devices) if kind != "collective-permute" else devices
    size = sum(_size(shape) for shape in shapes)
    if kind == "reduce-scatter":
        size *= ways
    kind = "reduce-scatter" if scattered else kind
    return Collective(kind, int(size), ways, 1, 0, tuple(shapes))


def _size(shape: str) -> float:
    dtype = shape.partition("[")[0]
    bits = re.match(r"[sufc](\d+)", dtype)
    each = _BYTES.get(dtype) or int(_only(bits).group(1)) / 8
    return each * _elements(shape)


def _elements(shape: str) -> int:
    return math.prod(int(n) for n in shape.rstrip("]").split("[")[1].split(",") if n)


def _ways(operands: str, devices: int) -> int:
    """The number of devices in a group of ``replica_groups``."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", operands):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", operands):
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", operands):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
        ways = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2)):
            ways *= int(part or sizes[axis])
        return ways
    return devices


def _continues(name: str, line: str) -> bool:
    """Whether this is a later part of a collective that another instruction began."""
    called = _CALLED.search(line)
    return name.startswith("async-collective-done") or (
        called is not None and called.group(1).startswith("async_collective_fusion")
    )


def _calls(line: str) -> Iterator[str]:
    for match in _CALLED.finditer(line):
        yield match.group(1)
    for match in _BRANCHES.finditer(line):
        yield from re.findall(r"[\w.\-]+", (match.group(1) or match.group(2)).replace("%", ""))


def _trips(line: str, condition: list[tuple[str, str]]) -> int | None:
    """How often a loop runs; None if it does not count from 0 to a constant."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(match.group(1))
    constants = {
        name: int(match.group(1))
        for name, text in condition
        if (match := re.search(r"\bconstant\((\d+)\)", text))
    }
    for _, text in condition:
        # an operand that is an element of a tuple ends in # and its index
        match = re.search(r"compare\(%?[\w.\-]+(?:#\d+)?, %?([\w.\-]+)\), direction=LT", text)
        if match and match.group(1) in constants:
            return constants[match.group(1)]
    return None


def _only(match: re.Match | None) -> re.Match:
    assert match is not None
    return match
