"""Traces of chosen steps, for XProf (TensorBoard) and Perfetto."""

import warnings
from pathlib import Path
from typing import Any

import jax

from layers.config import check
from research.training.goodput import Clock


class Trace:
    """Traces steps ``first`` up to ``end`` of a run, by their number, the first being 1.

    Each process writes ``<timestamp>/<host>.xplane.pb`` and ``perfetto_trace.json.gz`` below
    ``workdir/profile/plugins/profile``; of several, each in ``workdir/profile/process<index>``.

    Raises:
      ConfigError: steps that the run does not have, or no ``workdir`` to write to.
    """

    def __init__(
        self, steps: tuple[int, int] | None, total: int, workdir: Path | None, clock: Clock
    ):
        self._first, self._end = steps or (0, 0)
        self._clock = clock
        self._tracing = False
        if steps is None:
            return
        self._name = f"{self._first}:{self._end}"
        fits = 1 <= self._first < self._end <= total + 1
        check(fits, "profile", self._name, f"must be FIRST:END with 1 ≤ FIRST < END ≤ {total + 1}")
        check(workdir is not None, "profile", self._name, "needs a workdir to write to")
        assert workdir is not None
        self._folder = workdir / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process{jax.process_index()}"

    def resume(self, done: int) -> None:
        """Say which of the steps will not be traced, because ``done`` are behind."""
        if done < self._first or self._first == self._end:
            return
        left = f"only {done + 1}:{self._end}" if done + 1 < self._end else "nothing"
        message = f"profile={self._name}: the run goes on from step {done}: {left} is traced"
        warnings.warn(message, stacklevel=3)

    def begin(self, step: int, state: Any) -> None:
        """Call before ``step``, with what the one before left on the device."""
        if self._tracing or not self._first <= step < self._end:
            return
        with self._clock.during("profile"):
            jax.block_until_ready(state)  # no step but those asked for is to be in it
            options = jax.profiler.ProfileOptions()
            # Python's calls would crowd out the rest: Perfetto's file holds a million events
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
        self._tracing = True

    def end(self, step: int, state: Any) -> None:
        """Call after ``step``, with what it computes; waits for it and writes if it is the last."""
        if step + 1 == self._end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write what there is of a trace."""
        if self._tracing:
            self._tracing = False
            with self._clock.during("profile"):
                jax.profiler.stop_trace()
