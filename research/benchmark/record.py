"""A chip's file of measurements: merged op by op, shown as a table, drawn from the JSON alone."""

import re
from pathlib import Path
from typing import Any

from rich.table import Table

import pallas_kernels
from research.ablation.files import read_json, write_atomically, write_json
from research.benchmark.run import PASSES

RESULTS = Path(pallas_kernels.__file__).parent / "results"


def path(device_kind: str) -> Path:
    """The file of a chip."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


def save(found: dict[str, Any], to: Path) -> list[Path]:
    """Put ``found`` into the file ``to``, keeping other ops, and draw it; what was written."""
    ops = read_json(to) if to.exists() else {}
    ops[found["op"]] = found
    write_json(to, ops)
    plot = to.with_name(f"{to.stem}-{found['op']}.png")
    write_atomically(plot, lambda temporary: draw(read_json(to)[found["op"]], temporary))
    return [to, plot]


def table(found: dict[str, Any]) -> Table:
    """One row per case, pass and function that was timed."""
    shown = Table(title=f"{found['op']} on {found['machine']['device']}")
    for column in ("case", "pass", "who"):
        shown.add_column(column)
    for column in ("median ms", "quartiles", "rounds", "TFLOP/s", "GB/s", "temp MB", "compile s"):
        shown.add_column(column, justify="right")
    for case, passes in found["cases"].items():
        for which in PASSES:
            for who, row in passes[which].items():
                if "absent" in row:
                    continue  # a reason is a sentence, no cell: see `absences`
                temp, seconds = row["temp_bytes"], row["compile_seconds"]
                shown.add_row(
                    case,
                    which,
                    who,
                    f"{1e3 * row['median']:.2f}",
                    "–".join(f"{1e3 * value:.2f}" for value in row["quartiles"]),
                    str(row["rounds"]),
                    f"{row['flops_per_second'] / 1e12:.3f}",
                    f"{row['bytes_per_second'] / 1e9:.2f}",
                    "" if temp is None else f"{temp / 1e6:.1f}",
                    "" if seconds is None else f"{seconds:.1f}",
                )
    return shown


def absences(found: dict[str, Any]) -> list[str]:
    """A line for each function that was not timed, with the reason."""
    return [
        f"{case}, {which}: {who} absent: {row['absent']}"
        for case, passes in found["cases"].items()
        for which in PASSES
        for who, row in passes[which].items()
        if "absent" in row
    ]


def draw(found: dict[str, Any], to: Path) -> None:
    """Medians with quartiles, one panel a pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(n for c in found["cases"].values() for p in PASSES for n in c[p]))
    cases = list(found["cases"])
    for axes, which in zip(figure.subplots(1, 2), PASSES, strict=True):
        for i, name in enumerate(names):
            rows = [(x, found["cases"][c][which][name]) for x, c in enumerate(cases)]
            rows = [(x, row) for x, row in rows if "median" in row]
            offset = (i - (len(names) - 1) / 2) * 0.8 / len(names)
            heights = [1e3 * row["median"] for _, row in rows]
            low = [1e3 * (row["median"] - row["quartiles"][0]) for _, row in rows]
            high = [1e3 * (row["quartiles"][1] - row["median"]) for _, row in rows]
            places = [x + offset for x, _ in rows]
            label = name if rows else f"{name} (absent)"
            axes.bar(
                places, heights, 0.8 / len(names), yerr=[low, high], color=f"C{i}", label=label
            )
        axes.set_yscale("log")
        axes.set_xticks(range(len(cases)), cases)
        axes.set(title=which, ylabel="milliseconds (less is better)")
        axes.legend(fontsize="small")
    figure.suptitle(f"{found['op']}: {found['machine']['device']}")
    figure.savefig(to, format="png", dpi=120)
