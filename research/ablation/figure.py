"""The figure of a run: one panel a metric, one row an arm, seeds as dots, 95% interval as a bar."""

from pathlib import Path

import numpy as np

from research.ablation.claims import interval95
from research.ablation.experiment import Experiment
from research.ablation.results import Results

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

    arms = [arm.name for arm in experiment.arms if arm.name in results.arms]
    scalars = {arm: results.scalars(arm) for arm in arms}
    names = list(dict.fromkeys(name for arm in arms for name in scalars[arm])) or ["no metric"]
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(
        figsize=(1.6 + 3.4 * columns, rows * (1.1 + 0.34 * len(arms))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, name in zip(panels, names, strict=False):
        for row, arm in enumerate(arms):
            values = np.array(list(scalars[arm].get(name, {}).values()))
            values = values[np.isfinite(values)]
            if not len(values):
                panel.text(0.5, row, "–", transform=panel.get_yaxis_transform(), va="center")
                continue
            color = f"C{row % 10}"
            if len(values) > 1:
                panel.plot(
                    interval95(list(values)), (row, row), color=color, linewidth=5, alpha=0.35
                )
            panel.plot(values, np.full(len(values), row), ".", color=color, markersize=8)
            panel.plot(values.mean(), row, "|", color="black", markersize=14)
        panel.set_title(name, fontsize=10)
        panel.set_yticks(range(len(arms)), arms)
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.locator_params(axis="x", nbins=4)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(experiment.title, fontsize=11)
    figure.supxlabel(
        f"dots: {len(results.seeds)} seed(s) · tick: mean · bar: 95% interval", fontsize=8
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
