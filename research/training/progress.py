"""A progress bar for `train`: loss, tokens per second, MFU if it is known, and time left."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def describe(metrics: Mapping[str, float]) -> str:
    """``loss 2.345 · 12,345 tokens/s · 41% MFU``, of the metrics that are given."""
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {float(metrics['loss']):.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"{float(metrics['mfu']):.0%} MFU")
    return " · ".join(parts)


def lines(every: float = 30.0) -> Callable[[int, int, Mapping[str, float]], None]:
    """A callback that prints the first and last step, and one every ``every`` seconds."""
    last = -float("inf")

    def update(step: int, total: int, metrics: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if step < total and now - last < every:
            return
        last = now
        print(" · ".join(filter(None, (f"step {step}/{total}", describe(metrics)))), flush=True)

    return update


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Show a bar of ``total`` steps while inside; yields the callback that updates it.

    Without a terminal, and in a notebook without ipywidgets, which rich requires there, the
    callback prints `lines`.
    """
    console = Console()
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        yield lines()
        return
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, shown="")

        def update(step: int, total: int, metrics: Mapping[str, float]) -> None:
            progress.update(task, completed=step, shown=describe(metrics))

        yield update
