"""Traces of requests, and what a scheduler needs for them: steps and slots of the cache.

`simulate` runs no model. It counts what follows from lengths alone: the steps of static batching
(all rows of a group wait for the longest) and of continuous batching (Yu 2022, Orca, §3.2: a row
that ends makes room at once), and the part of the allocated slots that hold tokens (Kwon 2023,
PagedAttention, arXiv:2309.06180, Figure 2).
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from layers.config import check, check_types

# tokens of a row → slots that are allocated for it
Allocation = Callable[[int], int]


class Work(NamedTuple):
    """The lengths of one request: tokens of its prompt, and new tokens."""

    prompt: int
    new: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A lognormal law of lengths: ``exp(mean + spread · z)`` with normal ``z``.

    Lengths are rounded up to a multiple of ``multiple``, and then clipped to ``[least, most]``.
    """

    mean: float
    spread: float
    most: int
    least: int = 1
    multiple: int = 1

    def __post_init__(self):
        check_types(self)
        check(self.spread >= 0, "spread", self.spread, "must be ≥ 0")
        check(self.multiple > 0, "multiple", self.multiple, "must be > 0")
        check(0 < self.least <= self.most, "least", self.least, f"must be in [1, most={self.most}]")

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        """``count`` independent lengths."""
        drawn = np.exp(self.mean + self.spread * random.standard_normal(count))
        rounded = self.multiple * np.ceil(drawn / self.multiple)
        return np.clip(rounded, self.least, self.most).astype(int).tolist()


def draw_trace(count: int, prompt: Lengths, new: Lengths, seed: int) -> list[Work]:
    """``count`` requests whose lengths are independent; the same for the same ``seed``."""
    check(count > 0, "count", count, "must be > 0")
    random = np.random.default_rng(seed)
    prompts, news = (lengths.draw(count, random) for lengths in (prompt, new))
    return list(map(Work, prompts, news))


def preallocated(max_length: int) -> Allocation:
    """``max_length`` slots for each row, whatever it holds."""
    return lambda tokens: max_length


def powers_of_two(tokens: int) -> int:
    """The next power of two: a row that outgrows its slots gets twice as many."""
    return 1 << (tokens - 1).bit_length()


def blocks(size: int) -> Allocation:
    """Whole blocks of ``size`` slots, one more when the last is full (PagedAttention)."""
    return lambda tokens: -(-tokens // size) * size


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What `simulate` counts.

    ``steps``: of the decode program. ``rows``: sum over steps of the rows that run, including those
    of requests that are preempted. ``used``, ``allocated``: sums over steps of slots that hold
    tokens and of slots that are allocated. ``preemptions``: rows that lost their slots.
    """

    steps: int
    rows: int
    used: int
    allocated: int
    preemptions: int

    @property
    def utilisation(self) -> float:
        """The part of the allocated slots that hold tokens."""
        return self.used / self.allocated


def simulate(
    trace: Sequence[Work],
    slots: int,
    allocate: Allocation = blocks(1),  # noqa: B008
    *,
    memory: int | None = None,
    static: bool = False,
) -> Simulation:
    """Decode ``trace`` in order, with at most ``slots`` rows and ``memory`` slots of cache at once.

    In step ``i`` of a request (from 1), its row writes one token, holds ``prompt + i`` tokens, and
    ``allocate(prompt + i)`` slots. Prefill takes no step. ``static``: new rows begin only when no
    row runs. If the memory is too small for all rows to grow, the last that began is preempted: it
    waits as the first in the queue, and then begins again from its prompt.

    Raises:
      ConfigError: no slot, or a request that ``memory`` does not hold alone.
    """
    check(slots > 0, "slots", slots, "must be > 0")
    for i, work in enumerate(trace):
        needed = allocate(work.prompt + work.new)
        fits = memory is None or needed <= memory
        check(fits, f"trace[{i}]", tuple(work), f"requires {needed} slots, memory={memory}")
    limit = float("inf") if memory is None else memory
    waiting = collections.deque(trace)
    running: list[tuple[Work, int]] = []  # in the order in which they began; tokens written
    steps = rows = used = allocated = preemptions = 0

    def needed_by(rows: Sequence[tuple[Work, int]]) -> int:
        """The slots of ``rows`` after their next token."""
        return sum(allocate(work.prompt + done + 1) for work, done in rows)

    while waiting or running:
        may_begin = not (static and running)
        while may_begin and waiting and len(running) < slots:
            if needed_by([*running, (waiting[0], 0)]) > limit:
                break
            running.append((waiting.popleft(), 0))
        while needed_by(running) > limit:
            waiting.appendleft(running.pop()[0])
            preemptions += 1
        running = [(work, done + 1) for work, done in running]
        steps += 1
        rows += len(running)
        used += sum(work.prompt + done for work, done in running)
        allocated += sum(allocate(work.prompt + done) for work, done in running)
        running = [(work, done) for work, done in running if done < work.new]
    return Simulation(steps, rows, used, allocated, preemptions)
