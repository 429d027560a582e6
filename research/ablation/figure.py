"""The figure of a run: one panel a metric, one row an arm, seeds as dots, 95% interval as a bar.

Arms that measure other things have panels of their own.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from research.ablation.claims import interval95
from research.ablation.experiment import Experiment
from research.ablation.results import Results, comparable, metric_names

_COLUMNS = 3


def draw(experiment: Experiment, results: Results, path: Path) -> None:
    """Write a PNG to ``path``: the experiment's own ``figure(results, path)`` or the default."""
    own = getattr(experiment.module, "figure", None)
    if own is not None:
        own(results, path)
    else:
        _draw_default(experiment, results, path)


def _draw_default(experiment: Experiment, results: Results, path: Path) -> None:
    # An explicit Agg canvas: no display is asked for and no global state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scalars = {a.name: results.scalars(a.name) for a in experiment.arms if a.name in results.arms}
    groups = comparable(scalars)
    names = [metric_names(group) or ["no metric"] for group in groups]
    columns = min(_COLUMNS, max(map(len, names)))
    heights = [
        -(-len(own) // columns) * (1.1 + 0.34 * len(group))
        for own, group in zip(names, groups, strict=True)
    ]
    figure = Figure(figsize=(1.6 + 3.4 * columns, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False).ravel()
    order = list(scalars)
    for part, group, own in zip(parts, groups, names, strict=True):
        rows = -(-len(own) // columns)
        panels = part.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for panel, name in zip(panels, own, strict=False):
            _draw_panel(panel, name, group, [f"C{order.index(arm) % 10}" for arm in group])
        for panel in panels[len(own) :]:
            panel.set_visible(False)
    figure.suptitle(experiment.title, fontsize=11)
    figure.supxlabel(
        f"dots: {len(results.seeds)} seed(s) · tick: mean · bar: 95% interval", fontsize=8
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_panel(panel, name: str, arms: Mapping[str, Mapping], colors: list[str]) -> None:
    for row, (metrics, color) in enumerate(zip(arms.values(), colors, strict=True)):
        values = np.array(list(metrics.get(name, {}).values()))
        values = values[np.isfinite(values)]
        if not len(values):
            panel.text(0.5, row, "–", transform=panel.get_yaxis_transform(), va="center")
            continue
        if len(values) > 1:
            interval = interval95(list(values))
            panel.plot(interval, (row, row), color=color, linewidth=5, alpha=0.35)
        panel.plot(values, np.full(len(values), row), ".", color=color, markersize=8)
        panel.plot(values.mean(), row, "|", color="black", markersize=14)
    panel.set_title(name, fontsize=10)
    panel.set_yticks(range(len(arms)), list(arms))
    panel.set_ylim(len(arms) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.locator_params(axis="x", nbins=4)
