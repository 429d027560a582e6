"""Ends the command on Ctrl-C, SIGTERM and SIGHUP, and when its output can no longer be written.

A thread ends the process with `os._exit`. An exception from a signal handler would not do: Python
runs no handler while its main thread waits for XLA's compiler, loses the exception if it is raised
in a destructor or a callback, and at exit crashes in a thread that still compiles. Nothing is lost
by `os._exit`, because files are written completely or not at all. Training, which has steps to
save, replaces the handlers until they are saved (`research.training.stopping`).
"""

import contextlib
import errno
import functools
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

from research.files import remove_temporaries

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK = 0.02  # seconds between two looks whether training has saved

_stopping = threading.Event()  # a signal was received, or the output was lost
_goes_on = False  # whether the same command continues what is stopped
_finishing: str | None = None  # what is printed at a signal after which the command ends by itself
_messages = 2  # standard error, also while a command discards what libraries write there
_wakeup = -1  # what is written here wakes the thread: the numbers of signals


def install() -> None:
    """Watch for signals and for lost output from here to the end of the process."""
    global _wakeup, _messages
    _open_closed()
    _messages = os.dup(2)
    sys.stdout = _Output(sys.stdout or open(1, "w", closefd=False), "replace")
    sys.stderr = _Output(sys.stderr or open(2, "w", closefd=False), "backslashreplace")
    read, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    # ignored signals stay ignored: of a shell's background job, or of nohup
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, _heed)
    # a forked process would write its signals to this one's thread
    os.register_at_fork(after_in_child=functools.partial(_forget, heeded))
    threading.Thread(target=_watch, args=(read, heeded), name="signals", daemon=True).start()


def goes_on() -> None:
    """Say, when this command is stopped, that the same command continues."""
    global _goes_on
    _goes_on = True


@contextlib.contextmanager
def finishing(message: str) -> Iterator[None]:
    """Let the command end by itself after a signal, which it handles: only ``message`` is printed.

    A second Ctrl-C ends the process at once.
    """
    global _finishing
    _finishing = message
    try:
        yield
    finally:
        _finishing = None


def settle() -> None:
    """If the process is being stopped, wait for its end."""
    while _stopping.is_set():
        time.sleep(1)


def _forget(heeded: Iterable[int]) -> None:
    """Let the signals of a forked process, which has no thread that watches, end it."""
    signal.set_wakeup_fd(-1)
    for number in heeded:
        signal.signal(number, signal.SIG_DFL)


def _heed(number: int, frame: object) -> None:
    """The handler of the signals: the system has written ``number`` to the thread."""
    _stopping.set()


def _watch(descriptor: int, heeded: list[int]) -> NoReturn:
    """End the process after the first signal: at once, or when training has saved."""
    stopping, finishing = 0, False
    while True:
        ready, _, _ = select.select([descriptor], [], [], _LOOK if stopping else None)
        for number in os.read(descriptor, 64) if ready else b"":
            if number not in (*heeded, signal.SIGPIPE):
                continue
            if number == signal.SIGHUP:
                _silence(fd for fd in (0, 1, 2) if os.isatty(fd))
            if _finishing is not None and number != signal.SIGPIPE:
                if finishing and number == signal.SIGINT:
                    _end(number)
                if not finishing:
                    _print(_finishing)
                finishing = True
                continue
            _stopping.set()
            if number == signal.SIGINT and stopping:
                _end(number)
            if not stopping and _saves_first():
                _print("stopping; saves first (Ctrl-C again: stops without saving)")
            stopping = stopping or number
        if stopping and not _saves_first():
            _end(stopping)


def _saves_first() -> list:
    """The handlers of training, if it has steps to save."""
    handlers = (signal.getsignal(number) for number in SIGNALS)
    return [handler for handler in handlers if callable(handler) and handler is not _heed]


def _end(number: int) -> NoReturn:
    """End the process with the exit code of one that the signal ``number`` stopped."""
    try:
        if os.isatty(1):
            _write(1, "\x1b[?25h\n")  # the cursor, which a progress bar hides
        if number != signal.SIGPIPE:
            _print("stopped; the same command continues from here" if _goes_on else "stopped")
        remove_temporaries()
        processes = sys.modules.get("research.parallel.processes")
        if processes:
            processes.leave(128 + number)
    finally:  # no error in this thread may keep the process, which waits for its end
        os._exit(128 + number)


class _Output(io.TextIOWrapper):
    """Standard output or error; when it can no longer be written, the command is stopped.

    A character that its encoding lacks is replaced.
    """

    def __init__(self, stream, errors: str) -> None:
        encoding = stream.encoding
        super().__init__(stream.detach(), encoding, errors, line_buffering=True)

    def write(self, text: str) -> int:
        with self._written():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._written():
            super().flush()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except OSError as error:
            _silence([self.fileno()])
            if error.errno not in (errno.EPIPE, errno.EIO):
                _print(f"the output cannot be written: {error.strerror}")
            for handler in _saves_first()[:1]:
                handler(signal.SIGPIPE, None)
            _stopping.set()
            os.write(_wakeup, bytes([signal.SIGPIPE]))


def _open_closed() -> None:
    """Open closed standard streams: a file that took their number would get what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _silence(descriptors: Iterable[int]) -> None:
    """Let what is written to ``descriptors`` vanish."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _print(text: str) -> None:
    _write(_messages, f"ablate: {text}\n")


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())
