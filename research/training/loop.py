"""The training loop: resumes what a workdir holds, and leaves it resumable whatever happens."""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from layers.decoder import Decoder, DecoderConfig
from research.data import DataConfig, make_dataset, vocabulary_size
from research.parallel import (
    MeshConfig,
    make_mesh,
    shard_batch,
    time_order,
    use_mesh,
)
from research.parallel.processes import fate_shared
from research.training.check import check_run
from research.training.checkpoint import Checkpoints
from research.training.config import TrainingConfig
from research.training.divergence import DivergenceError, check_finite
from research.training.evaluate import evaluate
from research.training.feed import Feed
from research.training.flops import peak_flops, train_flops_per_token
from research.training.goodput import Clock
from research.training.metrics import Metrics
from research.training.optimizers import make_optimizer
from research.training.profile import Trace
from research.training.progress import bar
from research.training.state import TrainState, abstract_state
from research.training.step import LossFn, make_step, next_token_loss, scalars
from research.training.workdir import begin

Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained ``model`` and the last ``metrics``: of the last step and the last evaluation."""

    model: Decoder
    metrics: dict[str, float]


class Preempted(SystemExit):
    """SIGTERM arrived; everything was saved. Exit status 0: the scheduler may start it again."""

    def __init__(self):
        super().__init__(0)


def train(
    model: DecoderConfig,
    data: DataConfig,
    training: TrainingConfig,
    *,
    seed: int = 0,
    workdir: Path | str | None = None,
    mesh: MeshConfig = MeshConfig(),
    init: Callable[[Decoder], Decoder] | None = None,
    progress: Progress | None = None,
    loss_fn: LossFn = next_token_loss,
    profile: tuple[int, int] | None = None,
    devices: Sequence | None = None,
) -> TrainResult:
    """Train a decoder, from ``workdir``'s newest checkpoint if it holds one.

    Of several processes, one that is lost ends the others (`research.parallel.processes`).

    A resumed run gives the same numbers, bit for bit, as one that was never interrupted, on the
    same mesh and machine. SIGTERM saves and raises `Preempted` (exit status 0); Ctrl-C saves and
    raises KeyboardInterrupt.

    Args:
      seed: of the initial weights and of the order of the data.
      workdir: where checkpoints, metrics and the environment are written; None writes nothing.
      init: maps the freshly initialised model to the one to start from; not called on resume.
      progress: called with ``(step, steps, metrics)``; None shows a bar.
      loss_fn: see `research.training.step.next_token_loss`.
      profile: ``(first, end)``: trace these steps, ``end`` not among them, into
        ``workdir/profile``; see `research.training.profile`. Changes no number.
      devices: of ``mesh``; None is all there are.

    Raises:
      ConfigError: parts that do not fit one another or the devices, or a workdir that was begun
        with another configuration; before anything is compiled.
      DivergenceError: a loss or gradient that is not finite; the last good checkpoint stays.
      DataError: the data could not give a batch.
      WriteError: a checkpoint or the metrics could not be written; told at the next save or at the
        end, as saves are written while training goes on.
    """
    clock = Clock()
    the_mesh = make_mesh(mesh, devices)
    check_run(
        model,
        training,
        mesh,
        the_mesh,
        batch_size=data.batch_size,
        sequence_length=data.sequence_length,
        vocabulary=vocabulary_size(data),
    )
    workdir = None if workdir is None else Path(workdir)
    lead = jax.process_index() == 0
    trace = Trace(profile, training.steps, workdir, clock)
    batches = make_dataset(
        data,
        seed=seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    dataset = Feed(iter(batches), data)
    configuration = dict(model=model, data=data, training=training, mesh=mesh)
    if workdir is not None:
        begin(workdir, configuration, seed, lead)

    optimizer = make_optimizer(training.optimizer, training.steps, offload=mesh.offload)

    def fresh_state(model: Decoder) -> TrainState:
        return TrainState.begin(model, optimizer, seed)

    def fresh_model() -> Decoder:
        return Decoder(model, rngs=nnx.Rngs(seed))

    abstract = abstract_state(model, optimizer, the_mesh, mesh.zero_stage, offload=mesh.offload)
    placed = jax.tree.map(lambda a: a.sharding, abstract)
    checkpoints = Checkpoints(workdir / "checkpoints", training.keep) if workdir else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(the_mesh))
        if checkpoints:
            stack.callback(checkpoints.close)
        # inside of the line above: to close waits for the other processes
        stack.enter_context(fate_shared())
        restored = None
        if checkpoints:
            restored = checkpoints.restore(abstract)
        if restored is not None:
            state, position = restored
            dataset.set_state(position["data"])
        elif init is None:
            state = jax.jit(lambda: fresh_state(fresh_model()), out_shardings=placed)()
            position = {}
        else:
            first = init(jax.jit(fresh_model, out_shardings=placed.model)())
            state = jax.jit(fresh_state, out_shardings=placed)(first)
            position = {}
        clock.resume(position.get("seconds", {}), workdir if lead else None)
        trace.resume(int(state.step))
        stack.callback(trace.close)
        log = Metrics(workdir, int(state.step)) if workdir and lead else None
        if log:
            stack.callback(log.close)
        if progress is None:
            progress = stack.enter_context(bar(training.steps)) if lead else _silent
        stopped = stack.enter_context(_signals())
        stack.enter_context(dataset.watched())
        run = _Run(
            data, training, the_mesh, dataset, checkpoints, log, workdir, progress, stopped,
            loss_fn, mesh, clock, trace,
        )  # fmt: skip
        stack.enter_context(clock.during("step"))
        return run.go(state, dict(position.get("metrics", {})))


def _silent(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    """Progress of the processes other than the first: one bar is enough."""


class _Run:
    """The loop itself, with everything it writes to."""

    def __init__(
        self, data, training, mesh, dataset, checkpoints, log, workdir, progress, stopped, loss_fn,
        strategy, clock, trace,
    ):  # fmt: skip
        self.data, self.training, self.mesh = data, training, mesh
        self.dataset, self.checkpoints, self.log = dataset, checkpoints, log
        self.workdir, self.progress, self.stopped = workdir, progress, stopped
        self.loss_fn, self.strategy = loss_fn, strategy
        self.clock, self.trace = clock, trace
        self.metrics: dict[str, float] = {}
        self.saved = -1

    def go(self, state: TrainState, metrics: dict[str, float]) -> TrainResult:
        training, steps = self.training, self.training.steps
        self.metrics = metrics
        strategy: MeshConfig = self.strategy
        step_fn = make_step(training, self.loss_fn, strategy.zero_stage, offload=strategy.offload)
        tokens = self.data.batch_size * self.data.sequence_length
        flops = train_flops_per_token(state.model, self.data.sequence_length) * tokens
        peak = peak_flops()
        order = time_order(state.model.config, self.mesh, self.data.sequence_length)
        start = done = int(state.step)
        self.saved = start if start else -1
        pending = None
        since, since_step, waited = time.perf_counter(), start, self.dataset.waited
        while done < steps:
            self.trace.begin(done + 1, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                with self.clock.during("data", unless=functools.partial(_runs, pending)):
                    batch = self.dataset.next(done + 1)
                    placed = shard_batch(batch, self.mesh, order)
                with self.clock.during("compile" if done == start else "step"):
                    state, computed = step_fn(state, placed)
            done += 1
            self.trace.end(done, computed)
            # Step N runs while the numbers of step N − 1 are read.
            if pending is not None:
                self._read(*pending)
            pending = (done, computed, batch)
            if done == start + 1:
                # the first step holds the compilation, which is no part of the speed
                self._read(*pending)
                pending = None
                since, since_step, waited = time.perf_counter(), done, self.dataset.waited
            speed = {}
            if done > since_step:
                passed = time.perf_counter() - since
                seconds = passed / (done - since_step)
                speed["tokens_per_second"] = tokens / seconds
                speed["data_wait"] = (self.dataset.waited - waited) / passed
                if peak:
                    speed["mfu"] = flops / seconds / (peak * self.mesh.size)
            self.progress(done, steps, {**self.metrics, **speed})
            stopping = self._must_stop(done)
            due = done % training.checkpoint_every == 0 or done == steps or stopping
            evaluated = self._evaluates(done)
            if due or evaluated:
                if pending is not None:
                    self._read(*pending)
                    pending = None
                if evaluated:
                    self._evaluate(done, state.model)
                if due:
                    self._save(done, state, evaluated)
            if self.log and (done % training.log_every == 0 or done == steps):
                self.log.write("timing", done, {**speed, **self.clock.row()})
            if stopping and done < steps:
                if self.checkpoints:
                    self.checkpoints.close()
                raise KeyboardInterrupt if signal.SIGINT in self.stopped else Preempted
        return TrainResult(state.model, dict(self.metrics))

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

    def _evaluate(self, step: int, model: Decoder) -> None:
        batches = self.training.eval_batches
        with self.clock.during("evaluate"):
            held_out = evaluate(
                model, self.data, batches=batches, mesh=self.mesh, loss_fn=self.loss_fn
            )
        if not math.isfinite(held_out["loss"]):
            raise DivergenceError(
                f"step {step}: eval_loss={held_out['loss']}; the last checkpoint is from before it"
            )
        found = {f"eval_{name}": value for name, value in held_out.items()}
        self.metrics.update(found)
        if self.log:
            self.log.write("metrics", step, found)

    def _save(self, step: int, state: TrainState, evaluated: bool) -> None:
        if self.checkpoints is None or step == self.saved:
            return
        position = {
            "data": self.dataset.get_state(),
            "metrics": self.metrics,
            "seconds": self.clock.seconds(),
        }
        loss = self.metrics["eval_loss"] if evaluated else None
        with self.clock.during("save"):
            self.checkpoints.save(step, state, position, loss)
        self.saved = step


def _runs(pending: tuple | None) -> bool:
    """Whether the device is still at the step before."""
    return pending is not None and not all(value.is_ready() for value in pending[1].values())


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
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
