"""Sources of batches: Grain by default, or any object that gives the batch of a step.

A source may use the model that is being trained (on-policy sources generate with it). Its state is
saved beside the model's, and a resumed run gets the same batches, bit for bit.
"""

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from layers.config import check
from research.data import DataConfig, make_dataset

STALLED = 60.0  # seconds of waiting for a batch between two warnings


class DataError(RuntimeError):
    """The data could not give the next batch; the message names the data and the reason."""


class Source(Protocol):
    """Gives the batch of every step: arrays by name whose first axis is rows.

    ``name`` identifies the source in messages. ``batch_size``: rows of a batch over all processes;
    a process gives its own share. A source that supports evaluation also has ``held_out(batches)``,
    an iterator over that many batches, the same at every call.
    """

    name: str
    batch_size: int

    def next(self, step: int, model: Any) -> Mapping[str, Any]:
        """The batch of ``step`` (1 is the first), for the ``model`` at the start of that step.

        Raises StopIteration when there are no more batches.
        """
        ...

    def get_state(self) -> Any:
        """The state that determines the next batches, in JSON's types."""
        ...

    def set_state(self, state: Any) -> None:
        """Continue from what `get_state` returned."""
        ...


class GrainSource:
    """The batches of ``data`` for this process (`research.data.make_dataset`)."""

    def __init__(self, data: DataConfig, seed: int = 0):
        paths = f", data.paths={data.paths}" if data.paths else ""
        self.name = f"data.source={data.source!r}{paths}"
        self.batch_size = data.batch_size
        self._data = data
        self._iterator: Any = iter(_dataset(data, seed=seed))

    def next(self, step: int, model: Any) -> Mapping[str, np.ndarray]:
        del step, model
        return next(self._iterator)

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)

    def held_out(self, batches: int) -> Iterator[Mapping[str, np.ndarray]]:
        """The first ``batches`` batches of the held-out split."""
        return held_out(self._data, batches)


def held_out(data: DataConfig, batches: int) -> Iterator[Mapping[str, np.ndarray]]:
    """The first ``batches`` batches of the held-out split of ``data``."""
    return itertools.islice(iter(_dataset(data, split="validation")), batches)


def _dataset(data: DataConfig, **options: Any) -> Iterable[Mapping[str, np.ndarray]]:
    """The batches of ``data`` for this process."""
    index, count = jax.process_index(), jax.process_count()
    return make_dataset(data, process_index=index, process_count=count, **options)


def check_held_out(source: Source, field: str, batches: int) -> None:
    """Raise `ConfigError` for ``batches`` > 0 of a source that has no held-out batches."""
    supported = batches == 0 or hasattr(source, "held_out")
    check(
        supported,
        field,
        batches,
        f"must be 0: {source.name} has no held-out batches",
    )


class Feed:
    """The batches of ``source``, and the time that the loop waited for them.

    A source that hangs cannot be distinguished from a slow one, so neither ends the run. Inside
    `watched`, a line on standard error says every `STALLED` seconds what the run waits for. The
    share of time waited is in ``timing.jsonl``.

    Attributes:
      waited: seconds spent waiting for batches so far.
    """

    def __init__(self, source: Source):
        self._source = source
        self._request: tuple[float, int] | None = None  # time of the request, and its step
        self.waited = 0.0

    def next(self, step: int, model: Any) -> Mapping[str, Any]:
        """The batch of ``step``.

        Raises:
          DataError: the source or its thread failed, or there are no more batches.
        """
        name, started = self._source.name, time.perf_counter()
        self._request = started, step
        try:
            return self._source.next(step, model)
        except StopIteration:
            raise DataError(f"{name}: ends before step {step}") from None
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise DataError(
                f"{name}: no batch for step {step}: {type(error).__name__}: {reason}"
            ) from error
        finally:
            self._request = None
            self.waited += time.perf_counter() - started

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While inside, print a line on standard error for batches that do not come."""
        done = threading.Event()

        def watch():
            while not done.wait(STALLED):
                request = self._request
                waited = time.perf_counter() - request[0] if request else 0.0
                if request and waited >= STALLED:
                    text = (
                        f"{self._source.name}: no batch for step {request[1]} after {waited:.0f} s"
                    )
                    print(f"{text}; still waiting", file=sys.stderr, flush=True)

        threading.Thread(target=watch, name="data watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()
