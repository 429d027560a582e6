"""Many plans: meshes and strategies side by side, and the largest batch that fits."""

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
    """Not even the ``smallest`` batch fits."""

    def __init__(self, smallest: Plan):
        over = f"the smallest of this mesh exceeds its memory by {-smallest.spare} B"
        super().__init__(f"batch_size={smallest.setup.rows}: {over}")
        self.smallest = smallest


def candidates(setup: Setup) -> list[MeshConfig]:
    """Meshes worth comparing for ``setup`` on its slice: those of `_shapes` that divide it."""
    size = topology_mesh(setup.topology).size
    found = []
    for shape in _shapes(size, setup.model):
        config = dataclasses.replace(shape, offload=setup.mesh.offload)
        try:
            check_setup(dataclasses.replace(setup, mesh=config))
        except ConfigError:
            continue
        found.append(config)
    return found


def _shapes(size: int, model: DecoderConfig) -> Iterator[MeshConfig]:
    """``fsdp`` alone at every stage, beside ``data``, ``tensor`` and ``expert``; no axis is 1.

    All that beside a split of time, if the model's attention says how it bears one, and of layers,
    if the model says into how many micro-batches.
    """
    splits = model.attention is not None and model.attention.context != "gather"
    shapes = [(1, 1, 1), (4, 1, 1), (16, 1, 1)]
    shapes += [(1, 1, tensor) for tensor in (2, 4, 8)] + [(4, 1, 4)]
    if "moe" in model.feed_forward:
        shapes += [(1, ways, 1) for ways in (4, 8, 16)]
    times, layers = ((2, 4, 8) if some else (1,) for some in (splits, model.microbatches))
    for stage, sequence, shape in itertools.product(layers, times, shapes):
        data, expert, tensor = shape
        rest, left = divmod(size, stage * data * expert * sequence * tensor)
        if left or rest == 1:
            continue
        for zero in (1, 2, None) if shape == (1, 1, 1) else (None,):
            yield MeshConfig(data, rest, expert, sequence, tensor, stage, zero)


def best(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit the one with the least time a row, and of equals the one with most to
    spare."""

    def order(one: Plan) -> tuple[float, float]:
        return one.seconds / one.setup.rows, -one.spare

    return min((one for one in plans if one.fits), key=order, default=None)


def fit(setup: Setup, most: int = 2**16) -> tuple[Plan, Plan | None]:
    """The plan of the largest batch that fits, at most ``most``, and that of the next one.

    Batches are multiples of what the mesh and the micro-batches divide them by. Memory grows about
    linearly with them, so that a few compilations find the edge; both sides of it are compiled.

    Raises:
      TooLarge: not even the smallest batch fits.
    """
    mesh = topology_mesh(setup.topology, setup.mesh)
    parts = setup.training.gradient_accumulation if setup.training else 1
    unit = batch_ways(mesh) * parts
    plans: dict[int, Plan] = {}

    def at(units: int) -> Plan:
        if units not in plans:
            plans[units] = plan(dataclasses.replace(setup, batch_size=units * unit))
        return plans[units]

    smallest = at(1)
    if not smallest.fits:
        raise TooLarge(smallest)
    low, high = 1, None  # what fits, and what does not
    limit = max(1, most // unit)
    while low < limit and (high is None or high - low > 1):
        guess = _guess(plans, low, high, limit)
        if at(guess).fits:
            low = guess
        else:
            high = guess
    return at(low), None if high is None else at(high)


def _guess(plans: dict[int, Plan], low: int, high: int | None, limit: int) -> int:
    """Where the edge is, by the line through the two largest that fit; between ``low`` and
    ``high``."""
    fitting = sorted(units for units in plans if plans[units].fits)
    guess = 2 * low
    if len(fitting) > 1:
        first, last = fitting[-2:]
        slope = (plans[last].bytes["total"] - plans[first].bytes["total"]) / (last - first)
        guess = low + int(plans[low].spare / slope) if slope > 0 else limit
    if high is not None:
        guess = min(guess, high - 1)
    return min(max(guess, low + 1), limit)
