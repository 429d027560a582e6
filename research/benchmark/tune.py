"""Find an operation's block sizes for this chip: a small grid, in one run of its passes."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.table import Table

from layers.config import ConfigError
from pallas_kernels import blocks
from research.benchmark import measure
from research.benchmark.ops import IMPLEMENTATIONS, ours
from research.benchmark.peers import of_jax
from research.benchmark.run import Request
from research.files import read_json, write_text

Sizes = Mapping[str, int]


class Found(NamedTuple):
    """The result of `tune`: rows of sizes, the present ones first, and the index of the best."""

    title: str
    device_kind: str
    table: str  # the folder of ``blocks.json``
    rows: list[dict[str, Any]]
    best: int  # an index into ``rows``


def candidates(present: Sizes, grid: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """``present``, then all other points of the grid."""
    points = (dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values()))
    complete = ({**present, **point} for point in points)
    return [dict(present), *(sizes for sizes in complete if sizes != present)]


def choose(rows: Sequence[Mapping[str, Any]]) -> int:
    """The fastest of ``rows``, or the first if the difference is within the spread.

    If the quartiles of the fastest row overlap those of the first, the first is kept.
    """
    timed = [i for i, row in enumerate(rows) if "median" in row]
    best = min(timed, key=lambda i: rows[i]["median"])
    return best if rows[best]["quartiles"][1] < rows[0]["quartiles"][0] else 0


def tune(asked: Request, *, rounds: int, seconds: float, budget: measure.Budget) -> Found:
    """Time the grid of the operation on its tuning case (or on the case that is ``asked`` for).

    Raises:
      ConfigError: no block sizes to tune on this platform, or the present sizes fail.
    """
    platform = jax.default_backend()
    tuning = asked.op.tuning.get(platform)
    if tuning is None:
        raise ConfigError(f"op={asked.name!r}: it has no block sizes to tune on a {platform}")
    implementation = IMPLEMENTATIONS[platform][0]
    (case,) = asked.cases.values()
    arrays = asked.op.arrays(case)
    y = jax.eval_shape(ours(asked.name, "xla"), *arrays)
    backward = asked.op.backward is not None
    dy = [jax.random.normal(jax.random.key(1), y.shape, y.dtype)] if backward else []
    inputs = [*arrays, *dy]
    deadline = budget.share()
    prepared, failed = {}, {}
    grid_points = candidates(blocks.block_sizes(asked.op.module, platform), tuning.grid)
    for i, sizes in enumerate(grid_points):
        if budget.clock() >= deadline:
            failed[str(i)] = measure.BUDGET
            continue
        try:
            peer = of_jax(ours(asked.name, implementation, sizes))
            prepared[str(i)] = peer.prepare(inputs, backward)
        except Exception as error:  # most likely, the sizes do not fit the chip
            failed[str(i)] = f"failed: {measure.reason(error)}"
    failed |= measure.warm(prepared, measure.Agreement(), deadline, budget.clock)
    runs = {name: peer.run for name, peer in prepared.items() if name not in failed}
    times, not_timed = measure.interleave(runs, rounds, seconds, deadline, budget.clock)
    failed |= not_timed
    rows: list[dict[str, Any]] = [
        {"sizes": sizes}
        | (
            measure.describe(times[str(i)]) | {"temp_bytes": prepared[str(i)].temp_bytes}
            if str(i) in times
            else {"absent": failed[str(i)]}
        )
        for i, sizes in enumerate(grid_points)
    ]
    if "absent" in rows[0]:
        why = f"{implementation} with the present block sizes {rows[0]['absent']}"
        raise ConfigError(f"op={asked.name!r}: {why}")
    shape = " ".join(f"{field}={value}" for field, value in case.items())
    title = f"{asked.name} {implementation}, {asked.passes[-1]}, {shape}"
    kind = jax.devices()[0].device_kind
    return Found(title, kind, asked.op.module, rows, choose(rows))


def save(found: Found) -> str:
    """Write the best sizes to the op's table, in the row of this chip; returns a line about it."""
    path = blocks.path(found.table)
    if found.best == 0:
        return f"{path} is left as it is: nothing is faster than its spread"
    rows = read_json(path)
    rows[found.device_kind] = found.rows[found.best]["sizes"]
    lines = (f"  {json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in rows.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    blocks.table.cache_clear()
    return f"written: {path}, row {found.device_kind!r}"


def table(found: Found) -> Table:
    """A table of all points of the grid."""
    result = Table(title=found.title)
    for column in ("sizes", "median ms", "quartiles", "temp MB", ""):
        result.add_column(column, justify="left" if column in ("sizes", "") else "right")
    for i, row in enumerate(found.rows):
        sizes = " ".join(f"{name}={value}" for name, value in row["sizes"].items())
        remarks = ["present"] * (i == 0) + (["best"] if found.best else ["kept"]) * (
            i == found.best
        )
        if "absent" in row:
            result.add_row(sizes, "", "", "", row["absent"])
            continue
        low, high = (f"{1e3 * value:.2f}" for value in row["quartiles"])
        temp = "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1e6:.1f}"
        result.add_row(
            sizes, f"{1e3 * row['median']:.2f}", f"{low}–{high}", temp, ", ".join(remarks)
        )
    return result
