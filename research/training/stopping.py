"""Signals that stop a run: the steps that are completed are saved first."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(SystemExit):
    """SIGTERM was received and the run is saved. Exit status 0: the scheduler may restart it."""

    def __init__(self):
        super().__init__(0)


class Stopping:
    """From `listen` to `close`, records signals to stop; a second Ctrl-C raises at once.

    Before the first step there is nothing to save, so until `listen` signals do what they did.
    """

    def __init__(self):
        self.received: list[int] = []
        self._previous = {}

    def listen(self) -> None:
        """Begin to record; only the main thread can, and ignored signals stay ignored."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._record)

    def raise_(self) -> None:
        """Raise `Preempted`, or KeyboardInterrupt after Ctrl-C."""
        raise KeyboardInterrupt if signal.SIGINT in self.received else Preempted

    def close(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received.append(number)
