"""Plans of an experiment's arms: which programs there are, and the record of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layers.config import ConfigError, check, from_mapping
from layers.decoder import DecoderConfig
from research.ablation.experiment import Experiment
from research.data import DataConfig, vocabulary_size
from research.files import plain, write_json, write_text
from research.parallel import MeshConfig
from research.planning import sweep as sweeps
from research.planning.plan import plan
from research.planning.report import Planned, describe, lines, spell_fit, spell_mesh
from research.planning.step import CustomSetup, Setup
from research.training import TrainingConfig
from research.training.environment import environment

# arms → what to plan of them
Wanted = Mapping[tuple[str, ...], Sequence[Setup | CustomSetup]]

# of the configuration of a language model
_PARTS = ("model", "data", "training", "mesh")


def topology(experiment: Experiment, scale: str) -> str:
    """The slice that ``experiment`` names for its paper scale (``TOPOLOGY``).

    Raises:
      ConfigError: it names none, or ``scale`` is another one.
    """
    named = getattr(experiment.module, "TOPOLOGY", None)
    check(scale == "paper", "topology", None, f"say which slice for scale {scale}")
    check(named is not None, "topology", None, f"{experiment.name} names none for paper scale")
    return str(named)


def paper_arms(experiment: Experiment) -> list[str]:
    """The arms that ``experiment`` runs at paper scale: all, unless `PAPER_ARMS` names some."""
    named = getattr(experiment.module, "PAPER_ARMS", None)
    return [arm.name for arm in experiment.arms] if named is None else list(named)


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
    """Arms → what to plan of them, one for each of ``meshes``; arms of one program are one.

    An experiment that offers ``plan_step(config, mesh)``, which returns a `Step` of an arm's
    configuration, is planned by it, arm by arm; any other one is of a language model.

    Args:
      meshes: fields of `MeshConfig`; none is the configuration's own.
      batch: rows, in place of the configuration's.
      decode: rows and cached tokens of a decoding step, in place of a training step.

    Raises:
      ConfigError: a value that cannot be, or an experiment with neither a ``plan_step`` nor the
        configuration of a language model.
    """
    config: Any = experiment.config(scale, overrides)
    if getattr(experiment.module, "plan_step", None) is not None:
        for option, value in (("batch", batch), ("decode", decode)):
            check(value is None, option, value, _refusal([experiment.name]))
        return _custom_setups(experiment, config, topology, arms, meshes)
    found: dict[tuple[tuple[Setup, ...], int], list[str]] = {}
    for name in arms:
        arm: Any = experiment.arm_config(config, experiment.arm(name))
        missing = ", ".join(part for part in _PARTS if part not in arm)
        neither = f"has neither plan_step(config, mesh) nor, in its configuration, {missing}"
        check(not missing, "experiment", experiment.name, neither)
        model = from_mapping(DecoderConfig, arm.model, "model")
        data = from_mapping(DataConfig, arm.data, "data")
        training = from_mapping(TrainingConfig, arm.training, "training")
        # how many steps there are, and how they warm up, changes no program
        warmup = config.training.optimizer.warmup_steps
        training = dataclasses.replace(
            training,
            steps=config.training.steps,
            optimizer=dataclasses.replace(training.optimizer, warmup_steps=warmup),
        )
        vocabulary = 0 if decode else vocabulary_size(data)
        rows, length = decode or (data.batch_size, data.sequence_length)
        rows = rows if batch is None else batch
        check(rows > 0, "batch", rows, "must be > 0")
        each = tuple(
            Setup(
                model,
                topology,
                from_mapping(MeshConfig, mesh, "mesh"),
                rows,
                length,
                None if decode else training,
                vocabulary,
            )
            for mesh in (meshes or [arm.mesh])
        )
        found.setdefault((each, vocabulary), []).append(name)
    return {tuple(names): list(each) for (each, _), names in found.items()}


def _custom_setups(
    experiment: Experiment,
    config: Any,
    topology: str,
    arms: Sequence[str],
    meshes: Sequence[Mapping[str, Any]],
) -> Wanted:
    """Of an experiment that makes its own steps; its configuration may have a ``mesh``."""
    found: dict[tuple[str, ...], list[Setup | CustomSetup]] = {}
    for name in arms:
        arm: Any = experiment.arm_config(config, experiment.arm(name))
        found[name,] = [
            CustomSetup(
                experiment.module.plan_step, arm, topology, from_mapping(MeshConfig, mesh, "mesh")
            )
            for mesh in (meshes or [arm.get("mesh", {})])
        ]
    return found


def _refusal(names: Sequence[str]) -> str:
    return f"requires a language model: {', '.join(names)} has a plan_step"


def plans(wanted: Wanted) -> list[Planned]:
    """All of them, in order."""
    return [Planned(arms, plan(one)) for arms, each in wanted.items() for one in each]


def largest(wanted: Wanted, print_line: Callable[[str], None]) -> list[Planned]:
    """Of each the largest batch that fits, with the next one; ``print_line`` says where none does.

    Raises:
      ConfigError: none fits anywhere.
    """
    found, refused = [], []
    for arms, each in wanted.items():
        for one in each:
            if isinstance(one, CustomSetup):
                raise ConfigError(f"--fit: {_refusal(arms)}")
            try:
                found.append(Planned(arms, *sweeps.fit(one)))
            except sweeps.TooLarge as error:
                refused.append(error)
                print_line(f"{', '.join(arms)}, {spell_mesh(error.smallest)}: {error}")
    if not found:
        raise refused[0]
    return found


def sweep(wanted: Wanted, print_line: Callable[[str], None]) -> list[Planned]:
    """Of each the candidates of `research.planning.sweep`; ``print_line`` says how far it is."""
    found = []
    for arms, each in wanted.items():
        for setup in each:
            if isinstance(setup, CustomSetup):
                raise ConfigError(f"--sweep: {_refusal(arms)}")
            meshes = sweeps.candidates(setup)
            for number, mesh in enumerate(meshes, 1):
                one = plan(dataclasses.replace(setup, mesh=mesh))
                print_line(f"{number}/{len(meshes)} {spell_mesh(one)}: {spell_fit(one)}")
                found.append(Planned(arms, one))
    if not found:
        why = "no mesh of this slice, of two devices or more, divides the model and the batch"
        raise ConfigError(f"--sweep: {why}")
    return found


def record(experiment: Experiment, scale: str, found: Sequence[Planned], root: Path) -> list[Path]:
    """Write ``<root>/plans/<experiment>.json`` and ``.md``; their paths."""
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
