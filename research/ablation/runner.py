"""Runs units: skips what is finished, resumes what is not, and never overwrites either.

``workdir/<arm>/seed<k>/`` holds ``unit.json`` (the configuration, written first), whatever ``run``
writes, and ``result.json`` (written last, at once) or ``failed.json``.
"""

import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from layers.config import ConfigError
from research.ablation.experiment import Experiment, Unit
from research.ablation.overrides import flatten
from research.ablation.progress import Progress
from research.ablation.results import Results
from research.files import plain, read_json, write_json
from research.parallel import processes
from research.training import WriteError

RESULT, FAILED, UNIT = "result.json", "failed.json", "unit.json"


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, decided before it starts.

    Attributes:
      units: in running order: seed by seed, arms as declared, so sources come first.
      chosen: the arms asked for; ``units`` holds their sources too.
      warnings: one line for each arm that a ``--config`` override does not reach.
    """

    experiment: Experiment
    scale: str
    overrides: tuple[str, ...]
    chosen: tuple[str, ...]
    seeds: tuple[int, ...]
    workdir: Path
    units: tuple[Unit, ...]
    warnings: tuple[str, ...]

    def require_whole(self) -> None:
        """`ConfigError` unless this is the experiment as declared, which alone is recorded.

        Smoke scale decides nothing, so it is not recorded either.
        """
        declared = tuple(arm.name for arm in self.experiment.arms), self.experiment.seeds
        if (self.chosen, self.seeds) != declared or self.overrides:
            raise ConfigError("--record: needs all arms and seeds, and no --config overrides")
        if self.scale == "smoke":
            raise ConfigError("--record: smoke scale decides nothing; choose another --scale")


def plan(
    experiment: Experiment,
    scale: str,
    workdir: Path,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    profile: tuple[int, int] | None = None,
) -> Plan:
    """The units of ``experiment`` at ``scale``, configured and checked against ``workdir``.

    Args:
      arms, seeds: what to run; None is all. The arms that an arm starts from are added.
      overrides: ``field=value`` texts.
      profile: see `Unit`; no part of the configuration.

    Raises:
      ConfigError: unknown scale, arm or field, a value of a wrong type, an override that reaches
        no arm, or a unit in ``workdir`` that was started with another configuration.
    """
    seeds = experiment.seeds if seeds is None else tuple(dict.fromkeys(seeds))
    names = [arm.name for arm in experiment.arms]
    wanted = {experiment.arm(name).name for name in (names if arms is None else arms)}
    if not wanted or not seeds or min(seeds) < 0:
        raise ConfigError(f"arms={sorted(wanted)}, seeds={list(seeds)}: at least one, seeds ≥ 0")
    chosen = tuple(name for name in names if name in wanted)
    reached = _reached(experiment)
    needed = {name for arm in chosen for name in reached[arm]}
    selected = [arm for arm in experiment.arms if arm.name in needed]
    config = experiment.config(scale, overrides)
    warnings = []
    for text in overrides:
        field = text.partition("=")[0]
        hidden = [a.name for a in selected if any(_covers(own, field) for own in a.overrides)]
        if len(hidden) == len(selected):
            raise ConfigError(f"{text}: every arm that runs sets {field} itself")
        warnings += [f"arm {arm!r} sets {field} itself: {text} does not reach it" for arm in hidden]
    units = tuple(
        Unit(
            config=experiment.arm_config(config, arm),
            arm=arm.name,
            seed=seed,
            workdir=_folder(workdir, arm.name, seed),
            after={source: _folder(workdir, source, seed) for source in arm.after},
            profile=profile,
        )
        for seed in seeds
        for arm in selected
    )
    for unit in units:
        _check_same(unit)
    return Plan(
        experiment,
        scale,
        tuple(overrides),
        chosen,
        seeds,
        workdir,
        units,
        tuple(warnings),
    )


def apart(planned: Plan) -> list[str]:
    """Options of ``ablate run`` for each part of ``planned`` that needs no other one.

    Units that start from one another, or from the same one, are a part: machines that share the
    workdir can each take some. The order is the same whatever is finished, so that a number can
    name a part.
    """
    reached = _reached(planned.experiment)
    parts: list[list[str]] = []
    for name in planned.chosen:
        joined = [p for p in parts if any(reached[name] & reached[other] for other in p)]
        parts = [p for p in parts if p not in joined]
        parts.append([*(other for p in joined for other in p), name])
    order = planned.chosen.index
    parts = sorted((sorted(part, key=order) for part in parts), key=lambda part: order(part[0]))
    return [f"--arms={','.join(part)} --seeds={seed}" for seed in planned.seeds for part in parts]


def _reached(experiment: Experiment) -> dict[str, set[str]]:
    """Arm → itself and all that it starts from, directly or through others."""
    reached: dict[str, set[str]] = {}
    for arm in experiment.arms:  # sources are declared before what starts from them
        reached[arm.name] = {arm.name}.union(*(reached[source] for source in arm.after))
    return reached


def state(unit: Unit) -> str:
    """``finished``, ``failed``, ``interrupted`` or ``new``."""
    for name, word in ((RESULT, "finished"), (FAILED, "failed"), (UNIT, "interrupted")):
        if (unit.workdir / name).exists():
            return word
    return "new"


def execute(planned: Plan, progress: Progress) -> dict[tuple[str, int], str]:
    """Run all units that are not finished; (arm, seed) → message of those that failed.

    A unit that raises is recorded and the others go on, except those that start from it.
    KeyboardInterrupt and SIGTERM (as SystemExit) end the run; what was done stays, and the same
    call later goes on from there.

    Several processes run each unit together, and agree on what is finished and what failed; the
    first one writes.

    Raises:
      ConfigError: a mistake in the request, or a workdir that the processes do not share.
      WriteError: the disk took no more; the units that follow would not fare better.
    """
    failures: dict[tuple[str, int], str] = {}
    finished = [state(unit) == "finished" for unit in planned.units]
    if not processes.same_everywhere(np.asarray(finished)):
        raise ConfigError(f"workdir={str(planned.workdir)!r}: is not one folder for all processes")
    with _terminable(), progress.over(len(planned.units)):
        for unit, done in zip(planned.units, finished, strict=True):
            if done:
                progress.skip(unit.arm, unit.seed)
                continue
            started = time.monotonic()
            progress.start(unit.arm, unit.seed, resumed=state(unit) == "interrupted")
            missing = [source for source in unit.after if (source, unit.seed) in failures]
            message = _run_unit(planned.experiment, replace(unit, progress=progress.step), missing)
            if message:
                failures[unit.arm, unit.seed] = message
            progress.finish(unit.arm, unit.seed, time.monotonic() - started, message)
    return failures


def results(planned: Plan) -> Results:
    """The metrics of all finished units that the plan covers."""
    found = {
        (unit.arm, unit.seed): read_json(unit.workdir / RESULT)["metrics"]
        for unit in planned.units
        if state(unit) == "finished"
    }
    return Results(found, planned.seeds)


def _run_unit(experiment: Experiment, unit: Unit, missing: Sequence[str]) -> str:
    """Run one unit to its ``result.json``; the message of its failure, or the empty text.

    ``missing``: the arms that it starts from and that did not finish.
    """
    lead = processes.is_lead()
    fresh = state(unit) == "new"
    described = dict(arm=unit.arm, seed=unit.seed, config=unit.config)
    unit.workdir.mkdir(parents=True, exist_ok=True)
    if lead:
        (unit.workdir / FAILED).unlink(missing_ok=True)
        write_json(unit.workdir / UNIT, described)
    started = time.time()
    metrics: Mapping[str, Any] = {}
    message = trace = ""
    try:
        if missing:
            arms = f"arm{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"
            raise RuntimeError(f"{arms} of the same seed did not finish")
        with processes.fate_shared():
            metrics = _checked(experiment.run(unit))
    except WriteError:
        raise
    except ConfigError as error:
        # a mistake in the request, found before anything ran: leave no unit that was begun with it
        if fresh and lead:
            (unit.workdir / UNIT).unlink()
        raise ConfigError(f"arm {unit.arm!r}: {error}") from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        message, trace = f"{type(error).__name__}: {lines[0]}", traceback.format_exc()
    message = processes.first_failure(message)
    if lead and message:
        write_json(unit.workdir / FAILED, dict(described, error=message, traceback=trace))
    elif lead:
        write_json(
            unit.workdir / RESULT,
            dict(described, metrics=metrics, started=started, seconds=time.time() - started),
        )
    processes.barrier()  # what starts from this unit reads its result
    return message


def _checked(metrics: Any) -> Mapping[str, Any]:
    """``metrics`` in JSON's types, or TypeError unless it maps names to numbers or lists."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise TypeError(f"run returned {metrics!r}: must be a mapping of metrics")
    numbers = {name: plain(value) for name, value in metrics.items()}
    for name, value in numbers.items():
        for item in value if isinstance(value, list) else [value]:
            try:
                float(item)
            except (TypeError, ValueError):
                raise TypeError(f"run returned {name}={value!r}: must be numbers") from None
    return numbers


def _folder(workdir: Path, arm: str, seed: int) -> Path:
    return workdir / arm / f"seed{seed}"


def _covers(own: str, field: str) -> bool:
    return field == own or field.startswith(own + ".") or own.startswith(field + ".")


def _check_same(unit: Unit) -> None:
    """Refuse a unit that was started with another configuration: it would mix two experiments."""
    path = unit.workdir / UNIT
    if state(unit) == "new":
        return
    before, now = flatten(read_json(path)["config"]), flatten(plain(unit.config))
    for field in (*now, *before):
        if before.get(field) != now.get(field) or (field in before) != (field in now):
            raise ConfigError(
                f"{unit.workdir}: was run with {field}={before.get(field, 'absent')!r}, "
                f"now {now.get(field, 'absent')!r}: choose another --workdir or remove it"
            )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) inside, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
