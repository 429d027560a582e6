"""Plans as text: lines, a table, a verdict, and all fields in JSON's types."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from layers.state import CacheConfig
from research.files import plain
from research.planning import sweep
from research.planning.plan import Plan
from research.planning.step import CustomSetup


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan, the arms that it is for, and the plan of the next larger batch if it was computed."""

    arms: tuple[str, ...]
    plan: Plan
    next: Plan | None = None


def lines(one: Planned) -> list[str]:
    """The lines that describe one plan."""
    p = one.plan
    machine = f"{p.setup.topology} ({p.devices} × {p.device})"
    head = (
        f"{', '.join(one.arms)} on {machine}, mesh {spell_mesh(p)}",
        _work(p),
    )
    share = {name: p.bytes[name] for name in p.bytes if name not in ("total", "memory")}
    text = [*head, "", "bytes a device"]
    text += [f"  {name:<14}{_bytes(size):>12}" for name, size in share.items()]
    if p.host:
        text += [f"  {'(on the host)':<14}{_bytes(p.host):>12}"]
    text += [f"  {'total':<14}{_bytes(p.bytes['total']):>12}  {spell_fit(p)}", ""]
    if p.collectives is None:
        text += ["collectives: not known, the compiler gave up"]
    else:
        text += ["collectives a step"]
        text += [
            f"  {kind:<20}{row['count']:>8,.0f} times{_bytes(row['moved']):>14} sent a device"
            for kind, row in p.collectives.items()
        ] or ["  none"]
    flops = p.flops
    text += [
        "",
        f"FLOPs a step: {flops['model']:.4g} of the model, {flops['executed']:.4g} executed",
        f"arithmetic intensity: {p.intensity:,.0f} FLOPs a byte of memory",
        "a step takes at least "
        + ", ".join(f"{seconds * 1e3:,.1f} ms for {name}" for name, seconds in p.floor.items())
        + f": {p.bound}-bound, {' '.join(_rate(p))} at most",
        f"compiled in {p.compile_seconds:.0f} s",
    ]
    if one.next is not None:
        next_plan = one.next
        text.append(f"batch {next_plan.setup.rows} {spell_fit(next_plan)}")
    return text


def table(found: Sequence[Planned]) -> Table:
    """A table with one row per plan."""
    result = Table(title=f"{found[0].plan.setup.topology}, a device's bytes and times at best")
    all_names = dict.fromkeys(name for one in found for name in one.plan.bytes)
    names = [name for name in all_names if name not in ("total", "memory", "batch")]
    arms = len({one.arms for one in found}) > 1
    head = (["arms"] if arms else []) + ["mesh", "batch", *names, "total", "spare", "sent"]
    for name in [*head, "floor", "bound by", _rate(found[0].plan)[1]]:
        result.add_column(name, justify="left" if name in ("arms", "mesh") else "right")
    for one in found:
        p = one.plan
        row = [", ".join(one.arms)] if arms else []
        row += [spell_mesh(p), "" if isinstance(p.setup, CustomSetup) else str(p.setup.rows)]
        row += [_bytes(p.bytes[name]) if name in p.bytes else "" for name in names]
        row += [_bytes(p.bytes["total"]), _bytes(p.spare), _sent(p)]
        row += [f"{p.seconds * 1e3:,.0f} ms", p.bound, _rate(p)[0]]
        result.add_row(*row)
    return result


def verdict(found: Sequence[Planned]) -> str:
    """The best plan, or that none fits."""
    plans = [one.plan for one in found]
    arms = list(dict.fromkeys(one.arms for one in found))
    if len(arms) == len(found) > 1:
        too_large = [", ".join(one.arms) for one in found if not one.plan.fits]
        return f"do not fit: {'; '.join(too_large)}" if too_large else "all fit"
    if len(arms) > 1:
        each = [[one for one in found if one.arms == arm] for arm in arms]
        return "\n".join(f"{', '.join(of_arm[0].arms)}: {verdict(of_arm)}" for of_arm in each)
    chosen = sweep.best(plans)
    if chosen is None:
        return "none fits"
    return (
        f"best: {spell_mesh(chosen)}: {chosen.seconds * 1e3:,.0f} ms a step at least, "
        f"{_bytes(chosen.spare)} to spare"
    )


def describe(p: Plan) -> dict[str, Any]:
    """``p`` with its properties, in JSON's types."""
    derived = dict(fits=p.fits, spare=p.spare, seconds=p.seconds, bound=p.bound)
    described = {**dataclasses.asdict(p), **derived}
    described["setup"].pop("make", None)  # a function
    return plain(described)


def spell_mesh(p: Plan) -> str:
    """Axes and strategies in the form of ``--mesh``."""
    stage = p.setup.mesh.zero
    axes = [f"{name}:{size}" for name, size in p.mesh.items()]
    strategies = [f"zero:{stage}"] if stage else []
    strategies += ["offload:true"] if p.setup.mesh.offload else []
    return ",".join(axes + strategies) or "one device"


def _spell_cache(cache: CacheConfig) -> str:
    """What is not the default of ``cache``, for example ``, cached in pages of 16 in int8``."""
    pages = f" in pages of {cache.page}" if cache.kind == "paged" else ""
    dtype = f" in {cache.dtype}" if cache.dtype else ""
    return f", cached{pages}{dtype}" if pages or dtype else ""


def _work(p: Plan) -> str:
    setup = p.setup
    if isinstance(setup, CustomSetup):
        return "the experiment's plan_step"
    rows, length = setup.batch_size, setup.sequence_length
    if setup.training is None:
        work = f"decoding {rows:,} rows after {length:,} tokens{_spell_cache(setup.cache)}"
    else:
        parts = setup.training.gradient_accumulation
        split = f" in {parts} micro-batches" if parts > 1 else ""
        work = f"training on {rows:,} × {length:,} tokens a step{split}, remat {setup.model.remat}"
    return f"{p.parameters:,} parameters, {work}"


def _rate(p: Plan) -> tuple[str, str]:
    """The rate at the floor, and its unit."""
    if isinstance(p.setup, CustomSetup):
        return f"{1 / p.seconds:,.4g}", "steps/s"
    each = p.setup.sequence_length if p.setup.training else 1
    return f"{p.setup.batch_size * each / p.seconds:,.0f}", "tokens/s"


def _sent(p: Plan) -> str:
    if p.collectives is None:
        return ""
    return _bytes(sum(row["moved"] for row in p.collectives.values()))


def spell_fit(p: Plan) -> str:
    """Whether the plan fits, and by how many bytes."""
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
