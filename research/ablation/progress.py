"""One live display for a whole run: its units, and the steps of the running unit."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from research.training.progress import describe

_EVERY = 10.0  # seconds between lines where there is no terminal
_AFTER = "now evaluates and measures"  # a unit after its last step


class _TimeLeft(TimeRemainingColumn):
    """The time left, until the last step."""

    def render(self, task: Task) -> Text:
        return Text("") if task.finished else super().render(task)


class Progress:
    """Bars on a terminal, lines elsewhere: units done, step, loss, tokens/s and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._done = self._total = 0
        self._label = ""
        self._first = (0.0, 0)  # time and number of the unit's first reported step
        self._printed = 0.0

    @contextmanager
    def over(self, total: int) -> Iterator[None]:
        """Show the progress over ``total`` units inside the ``with`` block."""
        self._total = total
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            _TimeLeft(),
        )
        with Bars(*columns, console=self._console, transient=True) as self._bars:
            self._units = self._bars.add_task("units", total=total, shown="")
            self._steps = self._bars.add_task("", total=None, shown="", visible=False)
            yield
        self._bars = None

    def skip(self, arm: str, seed: int) -> None:
        """Show a unit that was finished before."""
        self._label = self._name(arm, seed)
        self._advance("finished before")

    def start(self, arm: str, seed: int, resumed: bool) -> None:
        self._label, self._first, self._printed = self._name(arm, seed), (0.0, 0), time.monotonic()
        if self._bars:
            self._bars.reset(
                self._steps, total=None, visible=True, description=self._label, shown=""
            )
        else:
            self._console.print(f"{self._label}: {'resumed' if resumed else 'started'}")

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show a step; the progress callback of a unit."""
        now = time.monotonic()
        if not self._first[0]:
            self._first = (now, step)
        shown = describe(metrics)
        trained = step >= total
        if trained:
            shown = " · ".join(filter(None, (shown, _AFTER)))
        if self._bars:
            self._bars.update(self._steps, completed=step, total=total, shown=shown)
        elif trained or now - self._printed >= _EVERY:
            self._printed = now
            start, first = self._first
            left = (now - start) / (step - first) * (total - step) if step > first else None
            time_left = "" if left is None or trained else f", {left:.0f} s left"
            self._console.print(f"{self._label}: step {step}/{total} {shown}{time_left}")

    def finish(self, arm: str, seed: int, seconds: float, failure: str) -> None:
        self._advance(f"failed: {failure}" if failure else f"done in {seconds:.1f} s")

    def _name(self, arm: str, seed: int) -> str:
        return f"unit {self._done + 1} of {self._total}: {arm}, seed {seed}"

    def _advance(self, outcome: str) -> None:
        self._done += 1
        if self._bars:
            self._bars.update(self._units, completed=self._done)
            self._bars.update(self._steps, visible=False)
        self._console.print(f"{self._label}: {outcome}", markup=False, highlight=False)
