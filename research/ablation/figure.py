"""The figure of a run: a panel per metric, a row per arm, seeds as dots, 95% intervals as bars.

Arms that report different metrics have separate panels.
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
    custom = getattr(experiment.module, "figure", None)
    if custom is not None:
        custom(results, path)
    else:
        _draw_default(experiment, results, path)


def _draw_default(experiment: Experiment, results: Results, path: Path) -> None:
    # An explicit Agg canvas requires no display and changes no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scalars = {a.name: results.scalars(a.name) for a in experiment.arms if a.name in results.arms}
    groups = comparable(scalars)
    names = [metric_names(group) or ["no metric"] for group in groups]
    columns = min(_COLUMNS, max(map(len, names)))
    heights = [
        -(-len(group_names) // columns) * (1.1 + 0.34 * len(group))
        for group_names, group in zip(names, groups, strict=True)
    ]
    figure = Figure(figsize=(1.6 + 3.4 * columns, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    subfigures = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False).ravel()
    order = list(scalars)
    for subfigure, group, group_names in zip(subfigures, groups, names, strict=True):
        rows = -(-len(group_names) // columns)
        panels = subfigure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for panel, name in zip(panels, group_names, strict=False):
            _draw_panel(panel, name, group, [f"C{order.index(arm) % 10}" for arm in group])
        for panel in panels[len(group_names) :]:
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
