"""Goodput: the share of a run's wall-clock time that was spent in steps that count."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from research.files import read_fields, write_json

PARTS: tuple[str, ...] = ("step", "start", "compile", "data", "evaluate", "save", "profile", "lost")


class Clock:
    """Assigns every second since the run began, restarts included, to one of `PARTS`.

    ``step``: steps that count, the only productive part. ``start``: from the call of `train` to the
    first step, including the initialisation or restoration of the state. ``compile``: the first
    call of the step after each start. ``data``: waiting for a batch while no step ran.
    ``evaluate``, ``save``: the time for which the loop stopped for them. ``profile``: beginning and
    writing a trace. ``lost``: from the checkpoint that a run resumes from (or from the beginning of
    the run if there was none) to its next start: steps that are computed again, and the time when
    no process ran.

    The seconds are saved with the state, so that steps after the checkpoint do not count. The time
    when the run began is in ``clock.json``, because there may be no checkpoint yet.
    """

    def __init__(self):
        self._called = time.time()
        self._since = time.monotonic()
        self._part = "start"
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def resume(self, seconds: Mapping[str, float], workdir: Path | None) -> None:
        """Continue from the checkpoint's ``seconds``; if empty, record when the run begins."""
        for part, spent in seconds.items():
            self._seconds[part] += spent
        if workdir is None:
            return
        path, before = workdir / "clock.json", sum(seconds.values())
        if not path.exists():
            write_json(path, {"began": self._called - before})
        elapsed = self._called - read_fields(path, {"began": (int, float)}, "delete it")["began"]
        # clocks of hosts differ: with a clock behind that of the previous host, nothing is lost
        self._seconds["lost"] += max(0.0, elapsed - before)

    @contextlib.contextmanager
    def during(self, part: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Assign the time inside to ``part``; if ``unless()`` at the end, to the previous part."""
        previous = self._part
        self._charge()
        self._part = part
        try:
            yield
        finally:
            if unless():
                self._part = previous
            self._charge()
            self._part = previous

    def seconds(self) -> dict[str, float]:
        """Part → seconds so far; their sum is the time since the run began."""
        self._charge()
        return dict(self._seconds)

    def row(self) -> dict[str, float]:
        """``goodput`` in [0, 1], and ``seconds_<part>`` of each part that is not 0."""
        seconds = self.seconds()
        elapsed = sum(seconds.values())
        row = {"goodput": seconds["step"] / elapsed} if elapsed else {}
        return row | {f"seconds_{part}": spent for part, spent in seconds.items() if spent}

    def _charge(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._since = now
