"""A progress bar for `train`: loss, tokens a second, MFU where known, time left."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def describe(metrics: Mapping[str, float]) -> str:
    """``loss 2.345 · 12,345 tokens/s · 41% MFU``, of those that are there."""
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {float(metrics['loss']):.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"{float(metrics['mfu']):.0%} MFU")
    return " · ".join(parts)


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Show a bar of ``total`` steps while inside; yields the callback that moves it."""
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total, shown="")

        def update(step: int, total: int, metrics: Mapping[str, float]) -> None:
            progress.update(task, completed=step, shown=describe(metrics))

        yield update
