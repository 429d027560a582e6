"""Batches for the loop, with a watch on where they come from."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from research.data import DataConfig

STALLED = 60.0  # seconds without a batch between two warnings


class DataError(RuntimeError):
    """The data could not give the next batch; the message says which data and why."""


class Feed:
    """The batches of ``iterator`` (Grain's, of ``config``), and how long the loop waited for them.

    Data that hangs cannot be told from data that is slow, so neither ends the run: a line on
    standard error says every `STALLED` seconds what is waited for (while `watched`), and the share
    of time waited is in ``timing.jsonl``.

    Attributes:
      waited: seconds spent waiting for batches so far.
    """

    def __init__(self, iterator: Any, config: DataConfig):
        self._iterator = iterator
        paths = f", data.paths={config.paths}" if config.paths else ""
        self._name = f"data.source={config.source!r}{paths}"
        self._asked: tuple[float, int] | None = None  # when, and for which step
        self.waited = 0.0

    def next(self, step: int) -> Any:
        """The batch of ``step``.

        Raises:
          DataError: the source or its thread failed, or there is no more.
        """
        began = time.perf_counter()
        self._asked = began, step
        try:
            return next(self._iterator)
        except StopIteration:
            raise DataError(f"{self._name}: ends before step {step}") from None
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise DataError(
                f"{self._name}: no batch for step {step}: {type(error).__name__}: {reason}"
            ) from error
        finally:
            self._asked = None
            self.waited += time.perf_counter() - began

    def get_state(self) -> Any:
        """Where the data stands, for a checkpoint."""
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tell of batches that do not come, while inside."""
        done = threading.Event()

        def watch():
            while not done.wait(STALLED):
                asked = self._asked
                waited = time.perf_counter() - asked[0] if asked else 0.0
                if asked and waited >= STALLED:
                    text = f"{self._name}: no batch for step {asked[1]} after {waited:.0f} s"
                    print(f"{text}; still waiting", file=sys.stderr, flush=True)

        threading.Thread(target=watch, name="data watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()
