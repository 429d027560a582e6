"""Traces of chosen steps, for XProf (TensorBoard) and Perfetto."""

import warnings
from pathlib import Path
from typing import Any

import jax

from layers.config import check
from research.training.goodput import Clock


def check_steps(steps: tuple[int, int] | None, total: int) -> str:
    """``steps`` as FIRST:END; raises `ConfigError` for steps that a run of ``total`` lacks."""
    first, end = steps or (1, 2)
    name, allowed = f"{first}:{end}", f"must be FIRST:END with 1 ≤ FIRST < END ≤ {total + 1}"
    check(1 <= first < end <= total + 1, "profile", name, allowed)
    return name


class Trace:
    """Traces the steps from ``first`` to before ``end`` of a run; the first step of a run is 1.

    Each process writes ``<timestamp>/<host>.xplane.pb`` and ``perfetto_trace.json.gz`` below
    ``workdir/profile/plugins/profile``; of several processes, each below
    ``workdir/profile/process<index>``.

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
        self._name = check_steps(steps, total)
        check(workdir is not None, "profile", self._name, "requires a workdir")
        assert workdir is not None
        self._folder = workdir / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process{jax.process_index()}"

    def resume(self, done: int) -> None:
        """Warn if steps will not be traced because ``done`` steps are completed already."""
        if done < self._first or self._first == self._end:
            return
        traced = f"only {done + 1}:{self._end}" if done + 1 < self._end else "nothing"
        message = f"profile={self._name}: the run resumes from step {done}: {traced} is traced"
        warnings.warn(message, stacklevel=3)

    def begin(self, step: int, state: Any) -> None:
        """Call before ``step``, with the state that the previous step computes."""
        if self._tracing or not self._first <= step < self._end:
            return
        with self._clock.during("profile"):
            jax.block_until_ready(state)  # finish earlier steps, so that they are not traced
            options = jax.profiler.ProfileOptions()
            # no Python calls: Perfetto's file is limited to a million events
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
        self._tracing = True

    def end(self, step: int, state: Any) -> None:
        """Call after ``step`` with its results; writes the trace after its last step."""
        if step + 1 == self._end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Stop tracing, if it has begun, and write the trace."""
        if self._tracing:
            self._tracing = False
            with self._clock.during("profile"):
                jax.profiler.stop_trace()
