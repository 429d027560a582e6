"""Compare the plans of meshes and strategies, and find the largest batch that fits."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from layers.config import ConfigError
from layers.decoder import DecoderConfig
from research.parallel import MeshConfig, batch_ways
from research.planning.plan import Plan, plan
from research.planning.step import Setup, check_setup
from research.planning.topology import topology_mesh


class TooLarge(ConfigError):
    """Even the ``smallest`` batch does not fit."""

    def __init__(self, smallest: Plan):
        over = f"the smallest of this mesh exceeds its memory by {-smallest.spare} B"
        super().__init__(f"batch_size={smallest.setup.rows}: {over}")
        self.smallest = smallest


def candidates(setup: Setup) -> list[MeshConfig]:
    """The meshes to compare for ``setup`` on its slice: those of `_shapes` that pass its checks."""
    size = topology_mesh(setup.topology).size
    configs = []
    for shape in _shapes(size, setup.model):
        config = dataclasses.replace(shape, offload=setup.mesh.offload)
        try:
            check_setup(dataclasses.replace(setup, mesh=config))
        except ConfigError:
            continue
        configs.append(config)
    return configs


def _shapes(size: int, model: DecoderConfig) -> Iterator[MeshConfig]:
    """``fsdp`` at every stage of ZeRO, or with ``data``, ``tensor`` or ``expert``; ``fsdp`` is > 1.

    All of these are combined with sizes of ``sequence`` if the attention supports a sharded time,
    and of ``stage`` if the model has micro-batches.
    """
    shards_time = model.attention is not None and model.attention.context != "gather"
    shapes = [(1, 1, 1), (4, 1, 1), (16, 1, 1)]
    shapes += [(1, 1, tensor) for tensor in (2, 4, 8)] + [(4, 1, 4)]
    if "moe" in model.feed_forward:
        shapes += [(1, ways, 1) for ways in (4, 8, 16)]
    sequences, layers = (
        (2, 4, 8) if enabled else (1,) for enabled in (shards_time, model.microbatches)
    )
    for stage, sequence, shape in itertools.product(layers, sequences, shapes):
        data, expert, tensor = shape
        fsdp, remainder = divmod(size, stage * data * expert * sequence * tensor)
        if remainder or fsdp == 1:
            continue
        for zero in (1, 2, None) if shape == (1, 1, 1) else (None,):
            yield MeshConfig(data, fsdp, expert, sequence, tensor, stage, zero)


def best(plans: Sequence[Plan]) -> Plan | None:
    """The plan that fits with the least time per row; of equals, with the most memory left."""

    def order(item: Plan) -> tuple[float, float]:
        return item.seconds / item.setup.rows, -item.spare

    return min((item for item in plans if item.fits), key=order, default=None)


def fit(setup: Setup, most: int = 2**16) -> tuple[Plan, Plan | None]:
    """The plan of the largest batch that fits, at most ``most``, and that of the next larger one.

    Batches are multiples of the rows that mesh and micro-batches require. Memory is about linear in
    the batch, so that few compilations find the limit. The batches on both sides of it are
    compiled.

    Raises:
      TooLarge: even the smallest batch does not fit.
    """
    mesh = topology_mesh(setup.topology, setup.mesh)
    microbatches = setup.training.gradient_accumulation if setup.training else 1
    unit = batch_ways(mesh) * microbatches
    plans: dict[int, Plan] = {}

    def at(units: int) -> Plan:
        if units not in plans:
            plans[units] = plan(dataclasses.replace(setup, batch_size=units * unit))
        return plans[units]

    smallest = at(1)
    if not smallest.fits:
        raise TooLarge(smallest)
    low, high = 1, None  # the largest that fits, the smallest that does not
    limit = max(1, most // unit)
    while low < limit and (high is None or high - low > 1):
        guess = _guess(plans, low, high, limit)
        if at(guess).fits:
            low = guess
        else:
            high = guess
    return at(low), None if high is None else at(high)


def _guess(plans: dict[int, Plan], low: int, high: int | None, limit: int) -> int:
    """The largest batch that may fit, between ``low`` and ``high``.

    Extrapolates linearly from the two largest batches that fit.
    """
    fitting = sorted(units for units in plans if plans[units].fits)
    guess = 2 * low
    if len(fitting) > 1:
        first, last = fitting[-2:]
        slope = (plans[last].bytes["total"] - plans[first].bytes["total"]) / (last - first)
        guess = low + int(plans[low].spare / slope) if slope > 0 else limit
    if high is not None:
        guess = min(guess, high - 1)
    return min(max(guess, low + 1), limit)
