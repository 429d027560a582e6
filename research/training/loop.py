"""`train`: a training run that resumes from the newest checkpoint of its workdir."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from layers.config import ConfigError, check
from layers.decoder import Decoder, DecoderConfig
from research.data import DataConfig, vocabulary_size
from research.parallel import MeshConfig, make_mesh, shardings, use_mesh
from research.parallel.processes import alone_in, fate_shared
from research.training.check import check_run
from research.training.config import TrainingConfig
from research.training.goodput import Clock
from research.training.metrics import Metrics
from research.training.models import ModelConfig, build
from research.training.objectives import Objective
from research.training.optimizers import make_optimizer
from research.training.profile import Trace
from research.training.progress import bar
from research.training.run import Progress, Run
from research.training.saved import SavedState
from research.training.source import GrainSource, Source, check_held_out
from research.training.state import TrainState, abstract_state
from research.training.step import default_objective, make_step
from research.training.stopping import Stopping
from research.training.workdir import begin, differences, load_model, record_changed_data


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained ``model`` and the last ``metrics``: of the last step and the last evaluation."""

    model: Any
    metrics: dict[str, float]


def train(
    model: DecoderConfig | ModelConfig,
    data: DataConfig | None,
    training: TrainingConfig,
    *,
    seed: int = 0,
    workdir: Path | str | None = None,
    mesh: MeshConfig = MeshConfig(),
    init: Callable[[Any], Any] | Path | str | None = None,
    objective: Objective | None = None,
    source: Source | None = None,
    frozen: Any = None,
    trainable: Sequence[str] = ("*",),
    progress: Progress | None = None,
    profile: tuple[int, int] | None = None,
    accept_changed_data: bool = False,
    devices: Sequence | None = None,
) -> TrainResult:
    """Train a model, from ``workdir``'s newest checkpoint if there is one.

    If one of several processes is lost, the others end (`research.parallel.processes`).

    A resumed run gives the same numbers, bit for bit, as a run that was never interrupted, on the
    same mesh and machine. From the first step on, SIGTERM and SIGHUP save and raise `Preempted`
    (exit status 0); Ctrl-C saves and raises KeyboardInterrupt.

    Args:
      model: a decoder's configuration, or one that builds another module (`ModelConfig`).
      data: the configuration of the data; None with a ``source``.
      seed: of the initial weights and of the order of the data.
      workdir: the folder for checkpoints, metrics and the environment; None writes nothing.
      init: the workdir of the model to start from, of the same configuration, whose companions (its
        tokenizer, its family) are kept; or a function that maps the freshly initialised model to
        it. Not read on resume.
      objective: what is minimised; None: next token, with ``training.z_loss``.
      source: gives the batches in place of ``data``.
      frozen: trees that the objective reads and that are not trained, see `Objective`. They are
        sharded like parameters and are not saved: give them again on resume.
      trainable: patterns for the paths of the trained parameters, see
        `research.training.trainable`. All other parameters have no gradient and no moments, and are
        saved once, beside the checkpoints.
      progress: called with ``(step, steps, metrics)``; None shows a bar.
      profile: ``(first, end)``: trace the steps from ``first`` to before ``end`` into
        ``workdir/profile``; see `research.training.profile`. Changes no number.
      accept_changed_data: continue a run whose files, library or tokenizer changed since it was
        begun. What changed is recorded in ``workdir/data.json`` with the step.
      devices: of ``mesh``; None: all.

    Raises:
      ConfigError: parts that do not fit one another or the devices, a split of the data without a
        document, or a workdir of a run with another configuration or other data, or in which
        another process runs; raised before compilation.
      DivergenceError: a loss or gradient is not finite; the last good checkpoint remains.
      DataError: the data could not give a batch.
      WriteError: a checkpoint or the metrics could not be written. Saves are written during
        training, so it is raised at the next save or at the end.
    """
    clock, patterns = Clock(), tuple(trainable)
    the_mesh = make_mesh(mesh, devices)
    _check_arguments(data, training, objective, source)
    comparable = data is not None and workdir is not None
    requires = "requires data and a workdir"
    check(not accept_changed_data or comparable, "accept_changed_data", True, requires)
    if data is None:
        assert source is not None
        size: Any = dict(batch_size=source.batch_size)
        check_held_out(source, "training.eval_batches", training.eval_batches)
    else:
        size = dict(batch_size=data.batch_size, sequence_length=data.sequence_length)
        size |= dict(vocabulary=vocabulary_size(data))
    check_run(model, training, mesh, the_mesh, objective=objective, patterns=patterns, **size)
    workdir = None if workdir is None else Path(workdir)
    lead = jax.process_index() == 0
    start, load = None, None
    if isinstance(init, (str, Path)):
        start, init = Path(init), None
        load = functools.partial(load_model, start, mesh, model=model, devices=devices)
    trace = Trace(profile, training.steps, workdir, clock)
    if data is not None:
        source = GrainSource(data, seed)
        if training.eval_batches:
            source.held_out(1)  # raises if no document is held out
    assert source is not None
    changed: list[str] = []
    strategy = dict(stage=mesh.zero_stage, patterns=patterns, offload=mesh.offload)
    saved, stopping = None, Stopping()
    with contextlib.ExitStack() as stack:
        stack.callback(stopping.close)  # when everything is saved
        if workdir is not None:
            stack.enter_context(alone_in(workdir))
            parts = dict(model=model, data=data, training=training, mesh=mesh, objective=objective)
            changed = begin(workdir, parts, seed, lead, patterns, accept_changed_data, start)
            abstract = functools.partial(_abstract, training, the_mesh, **strategy)
            saved = SavedState(workdir, training.keep, model, abstract, patterns)
        stack.enter_context(use_mesh(the_mesh))
        if saved:
            stack.callback(saved.close)
        # entered after the line above, so that it is left first: close waits for other processes
        stack.enter_context(fate_shared())
        restored = saved.restore() if saved else None
        if restored is not None:
            state, position = restored
            source.set_state(position["data"])
        else:
            state = _initial(model, training, the_mesh, seed, init, load, **strategy)
            position = {}
            if saved:
                saved.keep_fixed(state)
        if changed and lead:
            assert workdir is not None and data is not None
            record_changed_data(workdir, data, int(state.step), changed)
        clock.resume(position.get("seconds", {}), workdir if lead else None)
        trace.resume(int(state.step))
        stack.callback(trace.close)
        log = Metrics(workdir, int(state.step)) if workdir and lead else None
        if log:
            stack.callback(log.close)
        if progress is None:
            progress = stack.enter_context(bar(training.steps)) if lead else _silent
        run = Run(
            step=make_step(training, objective, **strategy),
            training=training,
            objective=objective or default_objective(training),
            source=source,
            frozen=_reshard_frozen(frozen, the_mesh),
            mesh=the_mesh,
            checkpoints=saved.checkpoints if saved else None,
            save=saved.save if saved else None,
            saved=int(state.step) or -1,
            log=log,
            workdir=workdir,
            progress=progress,
            stopping=stopping,
            clock=clock,
            trace=trace,
            metrics=dict(position.get("metrics", {})),
        )
        stack.enter_context(run.feed.watched())
        stack.enter_context(clock.during("step"))
        state = run.train(state)
        return TrainResult(state.model, dict(run.metrics))


def _check_arguments(data, training, objective, source) -> None:
    both = "given" if data is not None and source is not None else None
    check(
        (data is None) != (source is None),
        "source",
        both,
        "exactly one of data and source is required",
    )
    unused = objective is not None and training.z_loss
    check(
        not unused,
        "training.z_loss",
        training.z_loss,
        "must be 0 with an objective: set z_loss in NextToken",
    )


def _abstract(training, mesh, model, *, stage, patterns, offload) -> TrainState:
    optimizer = make_optimizer(training.optimizer, training.steps, offload=offload)
    return abstract_state(model, optimizer, mesh, stage, patterns=patterns, offload=offload)


def _initial(model, training, mesh: Mesh, seed: int, init, load, **strategy) -> TrainState:
    """The state of step 0, in its stored sharding; ``load()`` gives its model, if not None."""
    fresh_model, fresh_state = _begin(model, training, mesh, **strategy)
    started = fresh_model(seed) if load is None else load()
    if init is not None:
        started = init(started)
        _check_start(started, model)
    return fresh_state(started, seed)


def _check_start(started: Any, model: DecoderConfig | ModelConfig) -> None:
    """Raise `ConfigError` if ``started``, which init returned, is not a model of ``model``."""
    if not isinstance(model, DecoderConfig):
        return
    check(isinstance(started, Decoder), "init", type(started).__name__, "must return a Decoder")
    configs = dataclasses.asdict(started.config), dataclasses.asdict(model)
    for field, other, value in differences(*configs, "model"):
        raise ConfigError(f"{field}={value!r}: init returns a model with {other!r}")


@functools.lru_cache(maxsize=16)
def _begin(model, training, mesh: Mesh, *, stage, patterns, offload) -> tuple[Any, Any]:
    """Compiled for all seeds: ``(seed → model, (model, seed) → state of step 0)``."""
    abstract = _abstract(training, mesh, model, stage=stage, patterns=patterns, offload=offload)
    stored = jax.tree.map(lambda a: a.sharding, abstract)
    optimizer = make_optimizer(training.optimizer, training.steps, offload=offload)

    def fresh_model(seed):
        return build(model, nnx.Rngs(jax.random.key(seed)))

    def fresh_state(model, seed):
        return TrainState.begin(model, optimizer, seed, patterns)

    return (
        jax.jit(fresh_model, out_shardings=stored.model),
        jax.jit(fresh_state, out_shardings=stored),
    )


def _reshard_frozen(frozen: Any, mesh: Mesh) -> Any:
    return frozen if mesh.size == 1 else jax.device_put(frozen, shardings(frozen, mesh))


def _silent(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    """Progress of all processes but the first, which alone shows a bar."""
