"""Runs units: skips finished units, resumes interrupted ones, and overwrites neither.

``workdir/<arm>/seed<k>/`` holds ``unit.json`` (the configuration, written first), the files that
``run`` writes, and ``result.json`` (written last, atomically) or ``failed.json``.
"""

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
from research.ablation.parts import check_parts
from research.ablation.progress import Progress
from research.ablation.results import Results
from research.files import Number, plain, read_fields, write_json
from research.parallel import processes
from research.training import WriteError

RESULT, FAILED, UNIT = "result.json", "failed.json", "unit.json"
_RESULT = {
    "arm": str,
    "seed": int,
    "seconds": (int, float),
    "metrics": {str: (Number, [Number])},
}


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, decided before it starts.

    Attributes:
      units: in running order: seed by seed, arms in declared order, so sources come first.
      chosen: the selected arms; ``units`` also has the arms that they start from.
      warnings: one line for each arm that a ``--config`` override does not change.
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
        """Raise `ConfigError` unless this is the experiment as declared: only that is recorded.

        Smoke scale decides nothing and is not recorded either.
        """
        declared = tuple(arm.name for arm in self.experiment.arms), self.experiment.seeds
        if (self.chosen, self.seeds) != declared or self.overrides:
            raise ConfigError("--record: requires all arms and seeds, and no --config overrides")
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
    accept_changed_data: bool = False,
) -> Plan:
    """The units of ``experiment`` at ``scale``, configured and checked against ``workdir``.

    Args:
      arms, seeds: what to run; None means all. The arms that a selected arm starts from are added.
      overrides: ``field=value`` texts.
      profile, accept_changed_data: see `Unit`; not part of the configuration.

    Raises:
      ConfigError: an unknown scale, arm or field, a value of a wrong type, an override that changes
        no arm, or a unit in ``workdir`` that was started with another configuration.
    """
    seeds = experiment.seeds if seeds is None else tuple(dict.fromkeys(seeds))
    names = [arm.name for arm in experiment.arms]
    requested = {experiment.arm(name).name for name in (names if arms is None else arms)}
    if not requested or not seeds or min(seeds) < 0:
        raise ConfigError(f"arms={sorted(requested)}, seeds={list(seeds)}: at least one, seeds ≥ 0")
    chosen = tuple(name for name in names if name in requested)
    sources = _with_sources(experiment)
    required = {name for arm in chosen for name in sources[arm]}
    selected = [arm for arm in experiment.arms if arm.name in required]
    config = experiment.config(scale, overrides)
    warnings = []
    for text in overrides:
        field = text.partition("=")[0]
        fixed = [
            a.name for a in selected if any(_covers(changed, field) for changed in a.overrides)
        ]
        if set(chosen) <= set(fixed):
            raise ConfigError(f"{text}: every selected arm sets {field} itself: {', '.join(fixed)}")
        warnings += [f"arm {arm!r} sets {field} itself: {text} does not change it" for arm in fixed]
    units = tuple(
        Unit(
            config=experiment.arm_config(config, arm),
            arm=arm.name,
            seed=seed,
            workdir=_folder(workdir, arm.name, seed),
            after={source: _folder(workdir, source, seed) for source in arm.after},
            profile=profile,
            accept_changed_data=accept_changed_data,
        )
        for seed in seeds
        for arm in selected
    )
    for unit in units:
        _check_same(unit)
        with _named(unit):
            check_parts(unit.config)
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
    """Options of ``ablate run`` for each part of ``planned`` that requires no other part.

    Units that start from one another, or from the same unit, form a part. Machines that share the
    workdir can each run some parts. The order does not depend on what is finished, so a number
    identifies a part.
    """
    sources = _with_sources(planned.experiment)
    parts: list[list[str]] = []
    for name in planned.chosen:
        connected = [p for p in parts if any(sources[name] & sources[other] for other in p)]
        parts = [p for p in parts if p not in connected]
        parts.append([*(other for p in connected for other in p), name])
    order = planned.chosen.index
    parts = sorted((sorted(part, key=order) for part in parts), key=lambda part: order(part[0]))
    return [f"--arms={','.join(part)} --seeds={seed}" for seed in planned.seeds for part in parts]


def _with_sources(experiment: Experiment) -> dict[str, set[str]]:
    """Arm → itself and all arms that it starts from, directly or indirectly."""
    sources: dict[str, set[str]] = {}
    for arm in experiment.arms:  # sources are declared before the arms that start from them
        sources[arm.name] = {arm.name}.union(*(sources[source] for source in arm.after))
    return sources


def state(unit: Unit) -> str:
    """The state of ``unit``: ``finished``, ``failed``, ``interrupted`` or ``new``."""
    for name, word in ((RESULT, "finished"), (FAILED, "failed"), (UNIT, "interrupted")):
        if (unit.workdir / name).exists():
            return word
    return "new"


def execute(planned: Plan, progress: Progress) -> dict[tuple[str, int], str]:
    """Run all units that are not finished; returns (arm, seed) → message of those that failed.

    If a unit raises, its failure is recorded and the other units run, except those that start from
    it. KeyboardInterrupt, and SystemExit of a training that a signal stopped, end the run. Finished
    work stays, and the same call continues from there.

    Several processes run each unit together and agree on which units are finished or failed; the
    first process writes the files.

    Raises:
      ConfigError: an invalid configuration, found before any unit starts if the experiment checks
        it; a workdir that the processes do not share; or a unit that another process runs.
      WriteError: the disk cannot be written, so that later units would fail too.
    """
    failures: dict[tuple[str, int], str] = {}
    finished = [state(unit) == "finished" for unit in planned.units]
    if not processes.same_everywhere(np.asarray(finished)):
        raise ConfigError(f"workdir={str(planned.workdir)!r}: must be one folder for all processes")
    unfinished = [u for u, done in zip(planned.units, finished, strict=True) if not done]
    for unit in {unit.arm: unit for unit in unfinished}.values():  # seeds share a configuration
        with _named(unit):
            planned.experiment.check(unit)
    with progress.over(len(planned.units)):
        for unit, done in zip(planned.units, finished, strict=True):
            if done:
                progress.skip(unit.arm, unit.seed)
                continue
            started = time.monotonic()
            with processes.alone_in(unit.workdir):
                progress.start(unit.arm, unit.seed, resumed=state(unit) == "interrupted")
                missing = [source for source in unit.after if (source, unit.seed) in failures]
                shown = replace(unit, progress=progress.step)
                message = _run_unit(planned.experiment, shown, missing)
            if message:
                failures[unit.arm, unit.seed] = message
            progress.finish(unit.arm, unit.seed, time.monotonic() - started, message)
    return failures


def results(planned: Plan) -> Results:
    """The metrics of all finished units of the plan."""
    metrics = {
        (unit.arm, unit.seed): read_result(unit)["metrics"]
        for unit in planned.units
        if state(unit) == "finished"
    }
    return Results(metrics, planned.seeds)


def read_result(unit: Unit) -> dict[str, Any]:
    """The content of the unit's ``result.json``; raises `ConfigError` if it is damaged."""
    return read_fields(unit.workdir / RESULT, _RESULT, "delete it to run the unit again")


def _run_unit(experiment: Experiment, unit: Unit, missing: Sequence[str]) -> str:
    """Run one unit and write its ``result.json``; returns the message of its failure, or "".

    ``missing``: the arms that it starts from and that did not finish.
    """
    lead = processes.is_lead()
    fresh = state(unit) == "new"
    described = dict(arm=unit.arm, seed=unit.seed, config=unit.config)
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
        # an invalid configuration, found before anything ran: the folder must not keep it
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
    processes.barrier()  # units that start from this one read its result
    return message


def _checked(metrics: Any) -> Mapping[str, Any]:
    """``metrics`` in JSON's types; raises TypeError unless it maps names to numbers or lists."""
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


@contextmanager
def _named(unit: Unit) -> Iterator[None]:
    """A `ConfigError` inside names the unit's arm."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm {unit.arm!r}: {error}") from None


def _folder(workdir: Path, arm: str, seed: int) -> Path:
    return workdir / arm / f"seed{seed}"


def _covers(changed: str, field: str) -> bool:
    return field == changed or field.startswith(changed + ".") or changed.startswith(field + ".")


def _check_same(unit: Unit) -> None:
    """Raise `ConfigError` for a unit of another configuration, or with damaged files."""
    if state(unit) == "new":
        return
    if state(unit) == "finished":
        read_result(unit)
    remedy = f"delete {str(unit.workdir)!r} to run the unit again"
    started = read_fields(unit.workdir / UNIT, {"config": dict}, remedy)
    recorded, current = flatten(started["config"]), flatten(plain(unit.config))
    for field in (*current, *recorded):
        if recorded.get(field) != current.get(field) or (field in recorded) != (field in current):
            raise ConfigError(
                f"{unit.workdir}: was run with {field}={recorded.get(field, 'absent')!r}, "
                f"now {current.get(field, 'absent')!r}: choose another --workdir or remove it"
            )
