"""Results: the metrics of finished units, by arm and seed, paired over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.names import suggest


class NotRun(Exception):
    """A unit or a metric that a claim requires is missing; the message names it.

    Attributes:
      arm: the arm of that unit.
    """

    def __init__(self, message: str, arm: str) -> None:
        super().__init__(message)
        self.arm = arm


def comparable(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """Groups of ``arms`` (arm → metric → anything) that share metrics, directly or indirectly.

    An experiment may report different metrics for different arms. Arms of different groups are not
    rows of one table.
    """
    groups: list[dict[str, Mapping[str, Any]]] = []
    for arm, metrics in arms.items():
        connected = [g for g in groups if any(set(metrics) & set(other) for other in g.values())]
        groups = [g for g in groups if g not in connected]
        groups.append({name: m for g in connected for name, m in g.items()} | {arm: metrics})
    order = list(arms)
    return sorted(groups, key=lambda group: order.index(next(iter(group))))


def metric_names(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics of ``arms``, arm → metric → anything."""
    return list(dict.fromkeys(name for metrics in arms.values() for name in metrics))


class Results:
    """The metrics of finished units, which ``measure`` functions read.

    Attributes:
      seeds: the seeds that are compared; every array has one row for each, in this order.
      arms: names of the arms that have at least one finished unit.
    """

    def __init__(
        self, units: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]
    ) -> None:
        self._units = dict(units)
        self.seeds = tuple(seeds)
        self.arms = tuple(dict.fromkeys(arm for arm, seed in self._units if seed in self.seeds))

    def metric(self, arm: str, name: str) -> np.ndarray:
        """float64 [seeds] (or [seeds, ...] for a list) of metric ``name`` of ``arm``.

        Raises:
          NotRun: a seed of the arm is not finished, or does not report the metric.
        """
        rows = []
        for seed in self.seeds:
            if (arm, seed) not in self._units:
                raise NotRun(f"arm {arm!r} seed {seed} is not finished", arm)
            metrics = self._units[arm, seed]
            if name not in metrics:
                known = suggest(name, sorted(metrics))
                raise NotRun(f"arm {arm!r} seed {seed} does not report {name!r}; {known}", arm)
            rows.append(np.asarray(metrics[name], np.float64))
        if len({row.shape for row in rows}) > 1:
            raise NotRun(f"arm {arm!r}: {name!r} must have one length for all seeds", arm)
        return np.stack(rows) if rows else np.zeros(0)

    def scalars(self, arm: str) -> dict[str, dict[int, float]]:
        """Metric → seed → value of the finished units of ``arm``; lists are not included."""
        values: dict[str, dict[int, float]] = {}
        for seed in self.seeds:
            for name, value in self._units.get((arm, seed), {}).items():
                if not isinstance(value, (list, tuple)):
                    values.setdefault(name, {})[seed] = float(value)
        return values
