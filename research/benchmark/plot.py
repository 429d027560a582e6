"""A plot of one operation's record: speeds with quartiles, relative to the best peer."""

from pathlib import Path
from typing import Any

from research.benchmark.targets import REFERENCE, passes


def base(rows: dict[str, Any]) -> str | None:
    """The peer by whose times a pass's times are divided: the best peer, else the reference."""
    timed = [row for row in rows.values() if "median" in row]
    if timed and timed[0]["best_peer"]:
        return timed[0]["best_peer"]
    return REFERENCE if "median" in rows.get(REFERENCE, {}) else None


def points(found: dict[str, Any], which: str) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Case, name and speed relative to the case's `base` (None: not timed), in reading order."""
    rows_shown = []
    for case, measured in found["cases"].items():
        rows = measured[which]
        base_name = base(rows)
        for who, row in rows.items():
            if "absent" in row:
                rows_shown.append((case, who, None))
            elif who == base_name:
                # the base itself: its spread around 1
                low, high = (row["median"] / value for value in reversed(row["quartiles"]))
                rows_shown.append((case, who, {"ratio": 1.0, "quartiles": [low, high], **_ms(row)}))
            elif base_name is not None:
                rows_shown.append((case, who, {**row["times_as_fast_as"][base_name], **_ms(row)}))
            else:
                rows_shown.append((case, who, {"ratio": None, **_ms(row)}))
    return rows_shown


def _ms(row):
    return {"ms": 1e3 * row["median"]}


def draw(found: dict[str, Any], to: Path) -> None:
    """One panel per pass, one row per function, in bands of cases; right of the line is faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    timed = passes(found)
    count = sum(len(measured[timed[0]]) for measured in found["cases"].values())
    figure = Figure(figsize=(11, 1.9 + 0.3 * count), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(timed), sharey=True, squeeze=False)[0]
    for axes, which in zip(panels, timed, strict=True):
        shown = points(found, which)
        axes.axvline(1, color="0.4", linewidth=1)
        low, high = 0.8, 1.25
        previous = None
        for y, (case, who, point) in enumerate(shown):
            if case != previous and previous is not None:
                axes.axhline(y - 0.5, color="0.8", linewidth=0.8)
            previous = case
            if point is None:
                axes.annotate("not timed", (0.99, y), xycoords=("axes fraction", "data"),
                              ha="right", va="center", color="0.5", fontsize=8)  # fmt: skip
                continue
            ms = point["ms"]
            text, x = f"{float(f'{ms:.3g}'):g} ms", point["ratio"]
            if x is not None:
                first, third = point["quartiles"]
                low, high = min(low, first, x), max(high, third, x)
                spread = [[x - first], [third - x]]
                color = "C0" if who.startswith("ours/") else "C1"
                axes.errorbar([x], [y], xerr=spread, fmt="o", color=color, capsize=3)
                text = f"{x:.2f}x  {text}"
            axes.annotate(text, (0.99, y), xycoords=("axes fraction", "data"),
                          ha="right", va="center", fontsize=8)  # fmt: skip
        axes.set_xscale("log")
        # the right third of the panel is for the numbers
        axes.set_xlim(low / 1.15, 1.15 * high * (high / low) ** 0.6)
        # three ticks per decade, or more if all values are close
        ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
        if high / low < 4:
            ticks = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.7, 2, 3, 4)
        axes.set_xticks([t for t in ticks if low / 1.15 <= t <= 1.15 * high])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.set_yticks(range(len(shown)), [f"{case}  {who}" for case, who, _ in shown], fontsize=9)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        bases = {base(measured[which]) for measured in found["cases"].values()} - {None}
        beside = "best peer" if not bases or bases != {REFERENCE} else "reference"
        axes.set(title=which, xlabel=f"times as fast as the {beside} (right is faster)")
    figure.suptitle(f"{found['op']}, {found['machine']['device']}; bars: quartiles over rounds")
    figure.savefig(to, format="png", dpi=120)
