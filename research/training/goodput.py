"""Goodput: the share of a run's wall-clock time that went into steps that count."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from research.files import read_json, write_json

PARTS: tuple[str, ...] = ("step", "start", "compile", "data", "evaluate", "save", "profile", "lost")


class Clock:
    """Charges every second since the run began, restarts included, to one of `PARTS`.

    ``step``: steps that count, the only productive part. ``start``: from the call of `train` to the
    first step, with the state made or restored. ``compile``: the first call of the step, after each
    start. ``data``: waiting for a batch while no step ran. ``evaluate``, ``save``: while the loop
    stood still for it. ``profile``: beginning and writing a trace. ``lost``: from the checkpoint
    that a run goes on from, or from its beginning where there was none, to its next start: steps
    that are done again, and the time when no process ran.

    What was charged is saved with the state, so that steps after the checkpoint do not count. The
    moment when the run began is in ``clock.json``, since there may be no checkpoint yet.
    """

    def __init__(self):
        self._called = time.time()
        self._since = time.monotonic()
        self._part = "start"
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def resume(self, seconds: Mapping[str, float], workdir: Path | None) -> None:
        """Go on from ``seconds``, which the checkpoint held; with none, note that a run begins."""
        for part, spent in seconds.items():
            self._seconds[part] += spent
        if workdir is None:
            return
        path, before = workdir / "clock.json", sum(seconds.values())
        if not path.exists():
            write_json(path, {"began": self._called - before})
        elapsed = self._called - read_json(path)["began"]
        # hosts' clocks differ: a machine that is behind the one before has lost nothing
        self._seconds["lost"] += max(0.0, elapsed - before)

    @contextlib.contextmanager
    def during(self, part: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Charge what is inside to ``part``, unless at its end ``unless()``: as if not here."""
        before = self._part
        self._charge()
        self._part = part
        try:
            yield
        finally:
            if unless():
                self._part = before
            self._charge()
            self._part = before

    def seconds(self) -> dict[str, float]:
        """Part → seconds so far; their sum is the time since the run began."""
        self._charge()
        return dict(self._seconds)

    def row(self) -> dict[str, float]:
        """``goodput`` in [0, 1], and ``seconds_<part>`` of each part that took any."""
        seconds = self.seconds()
        elapsed = sum(seconds.values())
        row = {"goodput": seconds["step"] / elapsed} if elapsed else {}
        return row | {f"seconds_{part}": spent for part, spent in seconds.items() if spent}

    def _charge(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._since = now
