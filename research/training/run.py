"""The training loop: step after step, until the last or a signal."""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from layers.decoder import Decoder
from research.parallel import shard_batch
from research.training.checkpoint import Checkpoints
from research.training.config import TrainingConfig
from research.training.divergence import DivergenceError, check_finite
from research.training.evaluate import evaluate
from research.training.flops import peak_flops, train_flops_per_token
from research.training.goodput import Clock
from research.training.metrics import Metrics
from research.training.objectives import Objective
from research.training.profile import Trace
from research.training.source import Feed, Source
from research.training.state import TrainState
from research.training.step import scalars

Progress = Callable[[int, int, Mapping[str, float]], None]


class Preempted(SystemExit):
    """SIGTERM arrived; everything was saved. Exit status 0: the scheduler may start it again."""

    def __init__(self):
        super().__init__(0)


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run of ``step``, with what it reads and writes.

    ``save(step, state, position, loss)`` begins a checkpoint; None: nothing is saved. ``saved`` is
    the step of the newest one.
    """

    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    training: TrainingConfig
    objective: Objective
    source: Source
    frozen: Any
    mesh: Mesh
    checkpoints: Checkpoints | None
    save: Callable[[int, TrainState, Mapping[str, Any], float | None], None] | None
    saved: int
    log: Metrics | None
    workdir: Path | None
    progress: Progress
    stopped: list[int]
    clock: Clock
    trace: Trace
    metrics: dict[str, float]

    def __post_init__(self):
        self.feed = Feed(self.source)

    def go(self, state: TrainState) -> TrainState:
        """The state after the last step.

        Raises:
          Preempted, KeyboardInterrupt: a signal came, and what was done is saved.
        """
        start = done = int(state.step)
        pending, speed = None, None
        while done < self.training.steps:
            self.trace.begin(done + 1, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                with self.clock.during("data", unless=functools.partial(_runs, pending)):
                    batch = self.feed.next(done + 1, state.model)
                    config = getattr(state.model, "config", None)
                    sharded = shard_batch(batch, self.mesh, config)
                with self.clock.during("compile" if done == start else "step"):
                    state, computed = self.step(state, sharded, self.frozen)
            done += 1
            self.trace.end(done, computed)
            # Step N runs while the numbers of step N − 1 are read.
            if pending is not None:
                self._read(*pending)
            pending = (done, computed, batch)
            if speed is None:
                # the first step holds the compilation, which is no part of the speed
                self._read(*pending)
                pending = None
                speed = _Speed(state.model, batch, done, self)
            pending = self._after(done, state, pending, speed.row(done))
        return state

    def _after(self, done: int, state: TrainState, pending: Any, speed: dict[str, float]) -> Any:
        """Report, evaluate, save and stop, as is due after step ``done``; what is still pending."""
        training = self.training
        self.progress(done, training.steps, {**self.metrics, **speed})
        stopping = self._must_stop(done)
        due = done % training.checkpoint_every == 0 or done == training.steps or stopping
        evaluated = self._evaluates(done)
        if (due or evaluated) and pending is not None:
            self._read(*pending)
            pending = None
        if evaluated:
            self._evaluate(done, state.model)
        if due:
            self._save(done, state, evaluated)
        if self.log and (done % training.log_every == 0 or done == training.steps):
            self.log.write("timing", done, {**speed, **self.clock.row()})
        if stopping and done < training.steps:
            if self.checkpoints:
                self.checkpoints.close()
            raise KeyboardInterrupt if signal.SIGINT in self.stopped else Preempted
        return pending

    def _read(self, step: int, computed, batch) -> None:
        """Wait for a step's numbers; stop if they are not finite; log them when due."""
        values = {name: np.asarray(value).tolist() for name, value in computed.items()}
        check_finite(step, values, batch, self.workdir)
        self.metrics.update(scalars(values))
        if self.log and step % self.training.log_every == 0:
            self.log.write("metrics", step, values)

    def _must_stop(self, step: int) -> bool:
        """Whether a signal has come. Several processes must save at the same step, so they agree
        on it when metrics are logged."""
        if jax.process_count() == 1:
            return bool(self.stopped)
        if step % self.training.log_every:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.asarray(bool(self.stopped)))))

    def _evaluates(self, step: int) -> bool:
        due = step % self.training.eval_every == 0 or step == self.training.steps
        return due and self.training.eval_batches > 0

    def _evaluate(self, step: int, model: Any) -> None:
        with self.clock.during("evaluate"):
            held_out = evaluate(
                model,
                self.source,
                batches=self.training.eval_batches,
                mesh=self.mesh,
                objective=self.objective,
                frozen=self.frozen,
            )
        for name, value in held_out.items():
            if not math.isfinite(value):
                raise DivergenceError(
                    f"step {step}: eval_{name}={value}; the last checkpoint is from before it"
                )
        found = {f"eval_{name}": value for name, value in held_out.items()}
        self.metrics.update(found)
        if self.log:
            self.log.write("metrics", step, found)

    def _save(self, step: int, state: TrainState, evaluated: bool) -> None:
        if self.save is None or step == self.saved:
            return
        position = {
            "data": self.source.get_state(),
            "metrics": self.metrics,
            "seconds": self.clock.seconds(),
        }
        loss = self.metrics.get("eval_loss") if evaluated else None
        with self.clock.during("save"):
            self.save(step, state, position, loss)
        self.saved = step


class _Speed:
    """How fast steps go after the first, which compiled."""

    def __init__(self, model: Any, batch: Mapping[str, Any], step: int, run: Run):
        self._run, self._step, self._since = run, step, time.perf_counter()
        self._waited = run.feed.waited
        self._unit = "tokens" if "tokens" in batch else "rows"
        # a process holds its share of the rows
        length = np.shape(batch["tokens"])[1] if "tokens" in batch else 1
        self._count = run.source.batch_size * length
        self._flops, self._peak = None, peak_flops()
        if self._peak and isinstance(model, Decoder) and "tokens" in batch:
            self._flops = train_flops_per_token(model, length) * self._count

    def row(self, done: int) -> dict[str, float]:
        """``tokens_per_second`` (or ``rows_…``), ``data_wait``, and ``mfu`` where it is known."""
        if done <= self._step:
            return {}
        passed = time.perf_counter() - self._since
        seconds = passed / (done - self._step)
        row = {f"{self._unit}_per_second": self._count / seconds}
        row["data_wait"] = (self._run.feed.waited - self._waited) / passed
        if self._flops and self._peak:
            row["mfu"] = self._flops / seconds / (self._peak * self._run.mesh.size)
        return row


def _runs(pending: tuple | None) -> bool:
    """Whether the device is still at the step before."""
    return pending is not None and not all(value.is_ready() for value in pending[1].values())


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The signals that ask the run to stop, collected while inside; a second Ctrl-C is not."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may set handlers
        return

    def note(number, frame):
        if number == signal.SIGINT and seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
