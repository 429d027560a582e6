"""Plans of an experiment's arms: which programs to plan, and the record of the plans."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check, from_mapping
from layers.decoder import DecoderConfig
from layers.state import CacheConfig
from research.ablation.experiment import Experiment
from research.ablation.parts import PARTS
from research.data import DataConfig, vocabulary_size
from research.files import plain, write_json, write_text
from research.inference.engine import EngineConfig
from research.parallel import MeshConfig
from research.planning import sweep as sweeps
from research.planning.plan import plan
from research.planning.report import Planned, describe, lines, spell_fit, spell_mesh
from research.planning.step import CustomSetup, Setup
from research.training import TrainingConfig
from research.training.environment import environment

# arms → their setups to plan
Wanted = Mapping[tuple[str, ...], Sequence[Setup | CustomSetup]]


def topology(experiment: Experiment, scale: str) -> str:
    """The TPU slice that ``experiment`` declares for paper scale (``TOPOLOGY``).

    Raises:
      ConfigError: it declares none, or ``scale`` is not paper.
    """
    declared = getattr(experiment.module, "TOPOLOGY", None)
    check(scale == "paper", "topology", None, f"must name a slice at scale {scale}")
    check(declared is not None, "topology", None, f"{experiment.name} declares no TOPOLOGY")
    return str(declared)


def paper_arms(experiment: Experiment) -> list[str]:
    """The arms that ``experiment`` runs at paper scale: `PAPER_ARMS` if declared, or all."""
    declared = getattr(experiment.module, "PAPER_ARMS", None)
    return [arm.name for arm in experiment.arms] if declared is None else list(declared)


def setups(
    experiment: Experiment,
    scale: str,
    topology: str,
    *,
    arms: Sequence[str],
    meshes: Sequence[Mapping[str, Any]] = (),
    batch: int | None = None,
    decode: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
) -> Wanted:
    """Arms → their setups, one for each of ``meshes``; arms with the same program share an entry.

    An experiment with ``plan_step(config, mesh)``, which returns a `Step` for an arm's
    configuration, is planned by it, arm by arm. One whose configuration has an ``engine`` and no
    ``training`` is planned by the decoding step of that engine. Any other experiment trains a
    language model.

    Args:
      meshes: fields of `MeshConfig`; if empty, the configuration's mesh is used.
      batch: rows, in place of the configuration's.
      decode: rows and cached tokens of a decoding step, planned in place of a training step. The
        tokens are stored as an arm's ``cache`` says, if its configuration has one.

    Raises:
      ConfigError: an invalid value, or an experiment with neither a ``plan_step`` nor the
        configuration of a language model.
    """
    config: Any = experiment.config(scale, overrides)
    if getattr(experiment.module, "plan_step", None) is not None:
        for option, value in (("batch", batch), ("decode", decode)):
            check(value is None, option, value, _refusal([experiment.name]))
        return _custom_setups(experiment, config, topology, arms, meshes)
    arms_by_setups: dict[tuple[tuple[Setup, ...], int], list[str]] = {}
    for name in arms:
        arm: Any = experiment.arm_config(config, experiment.arm(name))
        part = _serving if "engine" in arm and "training" not in arm else _training
        setup = part(experiment, config, arm, topology, batch, decode)
        given = [from_mapping(MeshConfig, m, "mesh") for m in (meshes or [arm.get("mesh", {})])]
        arm_setups = tuple(dataclasses.replace(setup, mesh=mesh) for mesh in given)
        arms_by_setups.setdefault((arm_setups, setup.vocabulary), []).append(name)
    return {tuple(names): list(arm_setups) for (arm_setups, _), names in arms_by_setups.items()}


def _training(
    experiment: Experiment, config: Any, arm: Any, topology: str, batch: int | None, decode: Any
) -> Setup:
    """The training step of a language model, or its decoding step; without a mesh."""
    missing = ", ".join(part for part in PARTS if part not in arm)
    requirement = f"has neither plan_step(config, mesh) nor, in its configuration, {missing}"
    check(not missing, "experiment", experiment.name, requirement)
    model = from_mapping(DecoderConfig, arm.model, "model")
    data = from_mapping(DataConfig, arm.data, "data")
    training = from_mapping(TrainingConfig, arm.training, "training")
    # the number of steps and of warm-up steps does not change the program
    warmup = config.training.optimizer.warmup_steps
    training = dataclasses.replace(
        training,
        steps=config.training.steps,
        optimizer=dataclasses.replace(training.optimizer, warmup_steps=warmup),
    )
    if decode:
        cache = from_mapping(CacheConfig, arm.get("cache", {}), "cache")
        rows, length = decode
        return _decoding(model, topology, rows, length, batch, cache)
    rows = _rows(data.batch_size if batch is None else batch)
    length, vocabulary = data.sequence_length, vocabulary_size(data)
    return Setup(model, topology, MeshConfig(), rows, length, training, vocabulary)


def _serving(
    experiment: Experiment, config: Any, arm: Any, topology: str, batch: int | None, decode: Any
) -> Setup:
    """The decoding step of an engine, whose slots are all full; without a mesh."""
    model = from_mapping(DecoderConfig, arm.model, "model")
    engine = from_mapping(EngineConfig, arm.engine, "engine")
    rows, length = decode or (engine.slots, engine.max_length)
    return _decoding(model, topology, rows, length, batch, engine.cache)


def _decoding(model, topology, rows, length, batch, cache) -> Setup:
    rows = _rows(rows if batch is None else batch)
    return Setup(model, topology, MeshConfig(), rows, length, cache=cache)


def _rows(rows: int) -> int:
    check(rows > 0, "batch", rows, "must be > 0")
    return rows


def _custom_setups(
    experiment: Experiment,
    config: Any,
    topology: str,
    arms: Sequence[str],
    meshes: Sequence[Mapping[str, Any]],
) -> Wanted:
    """The setups of an experiment with ``plan_step``; its configuration may have a ``mesh``."""
    setups_by_arm: dict[tuple[str, ...], list[Setup | CustomSetup]] = {}
    for name in arms:
        arm: Any = experiment.arm_config(config, experiment.arm(name))
        setups_by_arm[name,] = [
            CustomSetup(
                experiment.module.plan_step, arm, topology, from_mapping(MeshConfig, mesh, "mesh")
            )
            for mesh in (meshes or [arm.get("mesh", {})])
        ]
    return setups_by_arm


def _refusal(names: Sequence[str]) -> str:
    return f"requires a language model: {', '.join(names)} has a plan_step"


def plans(wanted: Wanted) -> list[Planned]:
    """The plan of each setup, in order."""
    return [
        Planned(arms, plan(setup)) for arms, arm_setups in wanted.items() for setup in arm_setups
    ]


def largest(wanted: Wanted, print_line: Callable[[str], None]) -> list[Planned]:
    """For each setup the plan of the largest batch that fits, and that of the next larger batch.

    ``print_line`` reports each setup for which no batch fits.

    Raises:
      ConfigError: no batch fits for any setup.
    """
    planned, too_large = [], []
    for arms, arm_setups in wanted.items():
        for setup in arm_setups:
            if isinstance(setup, CustomSetup):
                raise ConfigError(f"--fit: {_refusal(arms)}")
            try:
                planned.append(Planned(arms, *sweeps.fit(setup)))
            except sweeps.TooLarge as error:
                too_large.append(error)
                print_line(f"{', '.join(arms)}, {spell_mesh(error.smallest)}: {error}")
    if not planned:
        raise too_large[0]
    return planned


def sweep(wanted: Wanted, print_line: Callable[[str], None]) -> list[Planned]:
    """For each setup the plans of its candidate meshes (`research.planning.sweep`).

    ``print_line`` reports each plan.
    """
    planned = []
    for arms, arm_setups in wanted.items():
        for setup in arm_setups:
            if isinstance(setup, CustomSetup):
                raise ConfigError(f"--sweep: {_refusal(arms)}")
            meshes = sweeps.candidates(setup)
            for number, mesh in enumerate(meshes, 1):
                result = plan(dataclasses.replace(setup, mesh=mesh))
                print_line(f"{number}/{len(meshes)} {spell_mesh(result)}: {spell_fit(result)}")
                planned.append(Planned(arms, result))
    if not planned:
        message = "no mesh of this slice, of two devices or more, divides the model and the batch"
        raise ConfigError(f"--sweep: {message}")
    return planned


def record(experiment: Experiment, scale: str, found: Sequence[Planned], root: Path) -> list[Path]:
    """Write ``<root>/plans/<experiment>.json`` and ``.md``; returns their paths."""
    stem = root / "plans" / experiment.name
    data, page = stem.with_suffix(".json"), stem.with_suffix(".md")
    described = plain(
        dict(
            experiment=experiment.name,
            title=experiment.title,
            scale=scale,
            command=f"ablate plan {experiment.name} --record",
            plans=[dict(arms=one.arms, **describe(one.plan)) for one in found],
            environment=environment(),
        )
    )
    text = [f"# Plan: {experiment.title}", "", f"`{described['command']}`, {scale} scale.", ""]
    for one in found:
        text += ["```", *lines(one), "```", ""]
    write_text(page, "\n".join(text))
    write_json(data, described)
    return [data, page]
