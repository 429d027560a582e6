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
from research.planning.plan import Setup, plan
from research.planning.report import Planned, describe, lines, spell_fit, spell_mesh
from research.training import TrainingConfig
from research.training.environment import environment
from research.training.optimizers import make_schedule


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
) -> dict[tuple[str, ...], list[Setup]]:
    """Arms → what to plan of them, one for each of ``meshes``; arms of one program are one.

    Args:
      meshes: fields of `MeshConfig`; none is the configuration's own.
      batch: rows, in place of the configuration's.
      decode: rows and cached tokens of a decoding step, in place of a training step.
    """
    config: Any = experiment.config(scale, overrides)
    found: dict[tuple[tuple[Setup, ...], int], list[str]] = {}
    for name in arms:
        arm: Any = experiment.arm_config(config, experiment.arm(name))
        for part in ("model", "data", "training", "mesh"):
            check(part in arm, "experiment", experiment.name, f"has no {part} to plan")
        model = from_mapping(DecoderConfig, arm.model, "model")
        data = from_mapping(DataConfig, arm.data, "data")
        training = from_mapping(TrainingConfig, arm.training, "training")
        make_schedule(training.optimizer, training.steps)  # raises where there can be none
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


def plans(wanted: Mapping[tuple[str, ...], Sequence[Setup]]) -> list[Planned]:
    """All of them, in order."""
    return [Planned(arms, plan(one)) for arms, each in wanted.items() for one in each]


def largest(
    wanted: Mapping[tuple[str, ...], Sequence[Setup]], tell: Callable[[str], None]
) -> list[Planned]:
    """Of each the largest batch that fits, with the next one; ``tell`` says where none does.

    Raises:
      ConfigError: none fits anywhere.
    """
    found, refused = [], []
    for arms, each in wanted.items():
        for one in each:
            try:
                found.append(Planned(arms, *sweeps.fit(one)))
            except sweeps.TooLarge as error:
                refused.append(error)
                tell(f"{', '.join(arms)}, {spell_mesh(error.smallest)}: {error}")
    if not found:
        raise refused[0]
    return found


def sweep(
    wanted: Mapping[tuple[str, ...], Sequence[Setup]], tell: Callable[[str], None]
) -> list[Planned]:
    """Of each the candidates of `research.planning.sweep`; ``tell`` says how far it is."""
    found = []
    for arms, each in wanted.items():
        for setup in each:
            meshes = sweeps.candidates(setup)
            for number, mesh in enumerate(meshes, 1):
                one = plan(dataclasses.replace(setup, mesh=mesh))
                tell(f"{number}/{len(meshes)} {spell_mesh(one)}: {spell_fit(one)}")
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
