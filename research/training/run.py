"""The training loop: steps until the last one or a signal."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
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
from research.training.stopping import Stopping

Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclasses.dataclass(kw_only=True)
class Run:
    """A training run from a compiled ``step``, with its source and its outputs.

    ``save(step, state, position, loss)`` begins a checkpoint; None: nothing is saved. ``saved``:
    the step of the newest checkpoint.
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
    stopping: Stopping
    clock: Clock
    trace: Trace
    metrics: dict[str, float]

    def __post_init__(self):
        self.feed = Feed(self.source)

    def train(self, state: TrainState) -> TrainState:
        """Train until the last step, and return the state after it.

        Raises:
          Preempted, KeyboardInterrupt: a signal was received; the completed steps are saved.
        """
        start = done = int(state.step)
        pending, speed = None, None
        while done < self.training.steps:
            self.trace.begin(done + 1, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                with self.clock.during("data", unless=functools.partial(_is_running, pending)):
                    batch = self.feed.next(done + 1, state.model)
                    config = getattr(state.model, "config", None)
                    sharded = shard_batch(batch, self.mesh, config)
                with self.clock.during("compile" if done == start else "step"):
                    state, computed = self.step(state, sharded, self.frozen)
            done += 1
            self.stopping.listen()  # from here on there are steps to save
            self.trace.end(done, computed)
            # The device computes step N while the metrics of step N − 1 are read.
            if pending is not None:
                self._read_metrics(*pending)
            pending = (done, computed, batch)
            if speed is None:
                # the first step includes the compilation, which is not counted in the speed
                self._read_metrics(*pending)
                pending = None
                speed = _Speed(state.model, batch, done, self)
            pending = self._finish_step(done, state, pending, speed.row(done))
        return state

    def _finish_step(
        self, done: int, state: TrainState, pending: Any, speed: dict[str, float]
    ) -> Any:
        """Report, evaluate, save and stop if due after step ``done``; return unread metrics."""
        training = self.training
        self.progress(done, training.steps, {**self.metrics, **speed})
        stopping = self._must_stop(done)
        due = done % training.checkpoint_every == 0 or done == training.steps or stopping
        evaluated = self._evaluates(done)
        if (due or evaluated) and pending is not None:
            self._read_metrics(*pending)
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
            self.stopping.raise_()
        return pending

    def _read_metrics(self, step: int, computed, batch) -> None:
        """Wait for the metrics of a step; stop if they are not finite; log them when due."""
        values = {name: np.asarray(value).tolist() for name, value in computed.items()}
        check_finite(step, values, batch, self.workdir)
        self.metrics.update(scalars(values))
        if self.log and step % self.training.log_every == 0:
            self.log.write("metrics", step, values)

    def _must_stop(self, step: int) -> bool:
        """Whether a signal was received.

        Several processes must save at the same step, so they agree on it when metrics are logged.
        """
        if jax.process_count() == 1:
            return bool(self.stopping.received)
        if step % self.training.log_every:
            return False
        received = np.asarray(bool(self.stopping.received))
        return bool(np.any(multihost_utils.process_allgather(received)))

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
                    f"step {step}: eval_{name}={value}; the last checkpoint is from an earlier step"
                )
        metrics = {f"eval_{name}": value for name, value in held_out.items()}
        self.metrics.update(metrics)
        if self.log:
            self.log.write("metrics", step, metrics)

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
    """The speed of all steps after the first one, which compiled."""

    def __init__(self, model: Any, batch: Mapping[str, Any], step: int, run: Run):
        self._run, self._step, self._since = run, step, time.perf_counter()
        self._waited = run.feed.waited
        self._unit = "tokens" if "tokens" in batch else "rows"
        # `batch` has only the rows of this process
        length = np.shape(batch["tokens"])[1] if "tokens" in batch else 1
        self._count = run.source.batch_size * length
        self._flops, self._peak = None, peak_flops()
        if self._peak and isinstance(model, Decoder) and "tokens" in batch:
            self._flops = train_flops_per_token(model, length) * self._count

    def row(self, done: int) -> dict[str, float]:
        """``tokens_per_second`` (or ``rows_…``), ``data_wait``, and ``mfu`` if it is known."""
        if done <= self._step:
            return {}
        elapsed = time.perf_counter() - self._since
        seconds = elapsed / (done - self._step)
        row = {f"{self._unit}_per_second": self._count / seconds}
        row["data_wait"] = (self._run.feed.waited - self._waited) / elapsed
        if self._flops and self._peak:
            row["mfu"] = self._flops / seconds / (self._peak * self._run.mesh.size)
        return row


def _is_running(pending: tuple | None) -> bool:
    """Whether the device still computes the previous step."""
    return pending is not None and not all(value.is_ready() for value in pending[1].values())
