"""The file of measurements of a chip: records of operations in JSON, and their tables."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import pallas_kernels
from research.benchmark.plot import draw
from research.benchmark.targets import REFERENCE, passes
from research.files import read_json, write_atomically, write_json, write_text

RESULTS = Path(pallas_kernels.__file__).parent / "results"

# columns of the page; the terminal shows the first eight
COLUMNS = ("who", "ms", "spread", "x peer", "x ref", "FLOP/s", "bytes/s", "temp MB",
           "quartiles ms", "rounds", "compile s")  # fmt: skip
PEAK = "peak MB"  # measured in a separate process, `research.benchmark.alone`
LEGEND = (
    "ms: the median; spread: half the distance of the quartiles; x peer, x ref: times as fast as "
    "the best peer and as ours/reference, median over rounds; %: of this machine's matmul and copy"
)
TERMINAL = 8


def path(device_kind: str) -> Path:
    """The file of the chip ``device_kind``."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


def save(found: dict[str, Any], to: Path) -> list[Path]:
    """Add ``found`` to the file ``to``, keep other ops, and plot it; returns the written files."""
    ops = read_json(to) if to.exists() else {}
    ops[found["op"]] = found
    write_json(to, ops)
    ops = read_json(to)
    plot = to.with_name(f"{to.stem}-{found['op']}.png")
    write_atomically(plot, lambda temporary: draw(ops[found["op"]], temporary))
    page = to.with_suffix(".md")
    write_text(page, markdown(ops, to.stem))
    return [to, page, plot]


def rows(found: dict[str, Any], case: str, which: str) -> Iterator[tuple[str, ...]]:
    """A row of `COLUMNS` for each function that was timed."""
    measured = found["cases"][case]
    ceiling = found["ceilings"][measured["case"]["dtype"]]
    for who, row in measured[which].items():
        if "absent" in row:
            continue  # `absences` lists the reasons
        temp, seconds = row["temp_bytes"], row["compile_seconds"]
        low, high = row["quartiles"]
        yield (
            who,
            f"{1e3 * row['median']:.2f}",
            f"±{(high - low) / 2 / row['median']:.0%}" if row["rounds"] > 1 else "1 round",
            "best" if who == row["best_peer"] else _times(row, row["best_peer"]),
            _times(row, REFERENCE),
            _rate(row, ceiling, "flops_per_second"),
            _rate(row, ceiling, "bytes_per_second"),
            _mb(temp),
            f"{1e3 * low:.2f}–{1e3 * high:.2f}",
            str(row["rounds"]),
            "" if seconds is None else f"{seconds:.1f}",
            *([_mb(row.get("peak_bytes"))] if PEAK in columns(found) else []),
        )


def columns(found: dict[str, Any]) -> tuple[str, ...]:
    """`COLUMNS`, and `PEAK` if it was measured."""
    timed = (row for case in found["cases"].values() for which in passes(found)
             for row in case[which].values())  # fmt: skip
    return (*COLUMNS, PEAK) if any("peak_bytes" in row for row in timed) else COLUMNS


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _times(row: dict[str, Any], name: str | None) -> str:
    compared = row["times_as_fast_as"].get(name)
    return "" if compared is None else f"{compared['ratio']:.2f}"


def _rate(row: dict[str, Any], ceiling: dict[str, float], which: str) -> str:
    if which not in row:
        return ""
    return f"{_si(row[which])} {row[which] / ceiling[which]:.0%}"


def _si(value: float) -> str:
    prefix, size = next((p, n) for p, n in (("T", 1e12), ("G", 1e9), ("M", 0.0)) if value >= n)
    return f"{value / (size or 1e6):.3g}{prefix}"


def headings(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Case, pass, and a title with shape and dtype."""
    for case, measured in found["cases"].items():
        shape = " ".join(f"{field}={value}" for field, value in measured["case"].items())
        for which in passes(found):
            yield case, which, f"{found['op']} {case}, {which} ({shape})"


def tables(found: dict[str, Any]) -> list[Table]:
    """One table per case and pass, for the terminal."""
    shown = []
    for case, which, title in headings(found):
        table = Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False
        )
        for column in COLUMNS[:TERMINAL]:
            table.add_column(column, justify="left" if column == "who" else "right", no_wrap=True)
        for row in rows(found, case, which):
            table.add_row(*row[:TERMINAL])
        if table.row_count:
            shown.append(table)
    return shown


def absences(found: dict[str, Any]) -> list[str]:
    """A line for each function that was not timed, with the reason."""
    return [
        f"{case}, {which}: {who} {row['absent']}"
        for case, which, _ in headings(found)
        for who, row in found["cases"][case][which].items()
        if "absent" in row
    ]


def verdicts(found: dict[str, Any]) -> list[str]:
    """A line for each target that was fixed before the run."""
    lines = []
    for target in found["targets"]:
        value = target.get("value")
        detail = target.get("why")
        if value is not None:
            detail = _si(value) if value >= 1e9 else f"{value:.2f}"
        suffix = f" ({detail})" if detail else ""
        lines.append(f"{target['verdict'].upper()}{suffix}: {target['target']}")
    return lines


def machine_lines(found: dict[str, Any]) -> list[str]:
    """The machine of the record, and its peak rates."""
    machine = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    ceilings = "; ".join(
        f"{dtype} matmul {_si(c['flops_per_second'])}FLOP/s, copy {_si(c['bytes_per_second'])}B/s"
        for dtype, c in found["ceilings"].items()
    )
    return [
        f"{machine['device']}; load before {machine['load']}; measured in the same run: {ceilings}",
        f"Python {machine['python']}, {packages}; commit {machine['commit']}"
        + (" with changes" if machine["dirty"] else ""),
    ]


def markdown(ops: dict[str, Any], stem: str) -> str:
    """The page of a chip's file."""
    lines = [
        f"# Kernels and models on {stem}",
        "",
        "Written by `ablate bench --record` from the JSON beside it.",
    ]
    lines += [LEGEND + "; the JSON has every time."]
    for name, found in ops.items():
        lines += ["", f"## {name}", "", *_list(machine_lines(found))]
        lines += ["", "Targets set before the run:", ""] if found["targets"] else []
        lines += _list(verdicts(found))
        lines += ["", f"![{name} beside its peers]({stem}-{name}.png)"]
        for case, which, title in headings(found):
            cells = list(rows(found, case, which))
            lines += ["", f"### {title}", ""]
            heads = columns(found)
            lines += [_row(heads), "|---" + "|---:" * (len(heads) - 1) + "|"] if cells else []
            lines += [_row(row) for row in cells]
            if not cells:
                lines.append("Nothing was timed.")
        missing = absences(found)
        lines += ["", "Not timed:", "", *_list(missing)] if missing else []
    return "\n".join(lines) + "\n"


def _list(lines: list[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
