"""Where batches come from: Grain by default, or anything that gives the batch of a step.

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

STALLED = 60.0  # seconds without a batch between two warnings


class DataError(RuntimeError):
    """The data could not give the next batch; the message says which data and why."""


class Source(Protocol):
    """Gives the batch of every step: arrays by name whose first axis is rows.

    ``name`` says which it is, in messages. ``batch_size``: rows of a batch over all processes; a
    process gives its own share. A source that can be evaluated on also has ``held_out(batches)``,
    an iterator of as many batches, the same ones every time.
    """

    name: str
    batch_size: int

    def next(self, step: int, model: Any) -> Mapping[str, Any]:
        """The batch of ``step`` (1 is the first), for the ``model`` that the step begins with.

        Raises StopIteration where there is no more.
        """
        ...

    def get_state(self) -> Any:
        """What the next batches depend on, in JSON's types."""
        ...

    def set_state(self, state: Any) -> None:
        """Go on from what `get_state` returned."""
        ...


class GrainSource:
    """The batches of ``data`` (`research.data.make_dataset`), of this process."""

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
    """This process's batches of ``data``."""
    index, count = jax.process_index(), jax.process_count()
    return make_dataset(data, process_index=index, process_count=count, **options)


def check_held_out(source: Source, batches: int) -> None:
    """Raise `ConfigError` for ``batches`` of a source that has none held out."""
    there = batches == 0 or hasattr(source, "held_out")
    check(there, "training.eval_batches", batches, f"must be 0: {source.name} has none held out")


class Feed:
    """The batches of ``source``, and how long the loop waited for them.

    Data that hangs cannot be told from data that is slow, so neither ends the run: a line on
    standard error says every `STALLED` seconds what is waited for (while `watched`), and the share
    of time waited is in ``timing.jsonl``.

    Attributes:
      waited: seconds spent waiting for batches so far.
    """

    def __init__(self, source: Source):
        self._source = source
        self._asked: tuple[float, int] | None = None  # when, and for which step
        self.waited = 0.0

    def next(self, step: int, model: Any) -> Mapping[str, Any]:
        """The batch of ``step``.

        Raises:
          DataError: the source or its thread failed, or there is no more.
        """
        name, began = self._source.name, time.perf_counter()
        self._asked = began, step
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
            self._asked = None
            self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Report batches that do not come, while inside."""
        done = threading.Event()

        def watch():
            while not done.wait(STALLED):
                asked = self._asked
                waited = time.perf_counter() - asked[0] if asked else 0.0
                if asked and waited >= STALLED:
                    text = f"{self._source.name}: no batch for step {asked[1]} after {waited:.0f} s"
                    print(f"{text}; still waiting", file=sys.stderr, flush=True)

        threading.Thread(target=watch, name="data watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()
