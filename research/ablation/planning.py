"""Plans of an experiment's arms: which programs there are, and what is said and kept of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from layers.config import ConfigError, check, from_mapping
from layers.decoder import DecoderConfig
from research.ablation.experiment import Experiment
from research.data import DataConfig
from research.files import plain, write_json, write_text
from research.parallel import MeshConfig
from research.parallel import sweep as sweeps
from research.parallel.plan import Plan, Setup, plan
from research.training import TrainingConfig
from research.training.environment import environment
from research.training.optimizers import make_schedule


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan, the arms that it is of, and the plan of the next larger batch if one was sought."""

    arms: tuple[str, ...]
    plan: Plan
    next: Plan | None = None


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
    found: dict[tuple[Setup, ...], list[str]] = {}
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
            )
            for mesh in (meshes or [arm.mesh])
        )
        found.setdefault(each, []).append(name)
    return {tuple(names): list(each) for each, names in found.items()}


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
                tell(f"{', '.join(arms)}, {_mesh(error.smallest)}: {error}")
    if not found:
        raise refused[0]
    return found


def sweep(
    wanted: Mapping[tuple[str, ...], Sequence[Setup]], tell: Callable[[str], None]
) -> list[Planned]:
    """Of each the candidates of `research.parallel.sweep`; ``tell`` says how far it is."""
    found = []
    for arms, each in wanted.items():
        for setup in each:
            meshes = sweeps.candidates(setup)
            for number, mesh in enumerate(meshes, 1):
                one = plan(dataclasses.replace(setup, mesh=mesh))
                tell(f"{number}/{len(meshes)} {_mesh(one)}: {_fits(one)}")
                found.append(Planned(arms, one))
    if not found:
        why = "no mesh of this slice, of two devices or more, divides the model and the batch"
        raise ConfigError(f"--sweep: {why}")
    return found


def lines(one: Planned) -> list[str]:
    """What there is to say of one plan."""
    p = one.plan
    head = (
        f"{', '.join(one.arms)} on {p.setup.topology} ({p.devices} × {p.device}), mesh {_mesh(p)}",
        f"{p.parameters:,} parameters, {_work(p.setup)}",
    )
    share = {name: p.bytes[name] for name in p.bytes if name not in ("total", "memory")}
    said = [*head, "", "bytes a device"]
    said += [f"  {name:<14}{_bytes(size):>12}" for name, size in share.items()]
    if p.host:
        said += [f"  {'(on the host)':<14}{_bytes(p.host):>12}"]
    said += [f"  {'total':<14}{_bytes(p.bytes['total']):>12}  {_fits(p)}", ""]
    if p.collectives is None:
        said += ["collectives: not known, the compiler gave up"]
    else:
        said += ["collectives a step"]
        said += [
            f"  {kind:<20}{row['count']:>8,.0f} times{_bytes(row['moved']):>14} sent a device"
            for kind, row in p.collectives.items()
        ] or ["  none"]
    flops = p.flops
    said += [
        "",
        f"FLOPs a step: {flops['model']:.4g} of the model, {flops['executed']:.4g} executed",
        f"arithmetic intensity: {p.intensity:,.0f} FLOPs a byte of memory",
        "a step takes at least "
        + ", ".join(f"{seconds * 1e3:,.1f} ms for {name}" for name, seconds in p.floor.items())
        + f": {p.bound}-bound, {_rate(p):,.0f} tokens/s at most",
        f"compiled in {p.compile_seconds:.0f} s",
    ]
    if one.next is not None:
        more = one.next
        said.append(f"batch {more.setup.batch_size} {_fits(more)}")
    return said


def table(found: Sequence[Planned]) -> Table:
    """One row a plan."""
    shown = Table(title=f"{found[0].plan.setup.topology}, a device's bytes and times at best")
    names = [name for name in found[0].plan.bytes if name not in ("total", "memory", "batch")]
    arms = len({one.arms for one in found}) > 1
    head = (["arms"] if arms else []) + ["mesh", "batch", *names, "total", "spare", "sent"]
    for name in [*head, "floor", "bound by", "tokens/s"]:
        shown.add_column(name, justify="left" if name in ("arms", "mesh") else "right")
    for one in found:
        p = one.plan
        row = [", ".join(one.arms)] if arms else []
        row += [_mesh(p), str(p.setup.batch_size), *(_bytes(p.bytes[name]) for name in names)]
        row += [_bytes(p.bytes["total"]), _bytes(p.spare), _sent(p)]
        row += [f"{p.seconds * 1e3:,.0f} ms", p.bound, f"{_rate(p):,.0f}"]
        shown.add_row(*row)
    return shown


def verdict(found: Sequence[Planned]) -> str:
    """Which one is best, or that none fits."""
    plans = [one.plan for one in found]
    arms = list(dict.fromkeys(one.arms for one in found))
    if len(arms) == len(found) > 1:
        lost = [", ".join(one.arms) for one in found if not one.plan.fits]
        return f"do not fit: {'; '.join(lost)}" if lost else "all fit"
    if len(arms) > 1:
        each = [[one for one in found if one.arms == of] for of in arms]
        return "\n".join(f"{', '.join(own[0].arms)}: {verdict(own)}" for own in each)
    chosen = sweeps.best(plans)
    if chosen is None:
        return "none fits"
    return (
        f"best: {_mesh(chosen)}: {chosen.seconds * 1e3:,.0f} ms a step at least, "
        f"{_bytes(chosen.spare)} to spare"
    )


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


def describe(p: Plan) -> dict[str, Any]:
    """``p`` with what follows from it, in JSON's types."""
    more = dict(fits=p.fits, spare=p.spare, seconds=p.seconds, bound=p.bound)
    return plain({**dataclasses.asdict(p), **more})


def _mesh(p: Plan) -> str:
    stage = p.setup.mesh.zero
    axes = [f"{name}:{size}" for name, size in p.mesh.items()]
    strategies = [f"zero:{stage}"] if stage else []
    strategies += ["offload:true"] if p.setup.mesh.offload else []
    return ",".join(axes + strategies) or "one device"


def _work(setup: Setup) -> str:
    rows, length = setup.batch_size, setup.sequence_length
    if setup.training is None:
        return f"decoding {rows:,} rows after {length:,} tokens"
    parts = setup.training.gradient_accumulation
    split = f" in {parts} micro-batches" if parts > 1 else ""
    return f"training on {rows:,} × {length:,} tokens a step{split}, remat {setup.model.remat}"


def _rate(p: Plan) -> float:
    """Tokens a second at the floor."""
    each = p.setup.sequence_length if p.setup.training else 1
    return p.setup.batch_size * each / p.seconds


def _sent(p: Plan) -> str:
    if p.collectives is None:
        return ""
    return _bytes(sum(row["moved"] for row in p.collectives.values()))


def _fits(p: Plan) -> str:
    memory = _bytes(p.bytes["memory"])
    if p.fits:
        return f"fits {memory} with {_bytes(p.spare)} to spare"
    return f"does not fit {memory}: {_bytes(-p.spare)} too many"


def _bytes(size: float) -> str:
    sign, size = ("-" if size < 0 else ""), abs(size)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{sign}{size:,.4g} {unit}"
        size /= 1024
    return f"{sign}{size:,.2f} GiB"
