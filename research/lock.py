"""One run at a time in a folder."""

import contextlib
import datetime
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from layers.config import ConfigError

LOCK = "lock"  # the file that is locked; it says who locked it last

_held: set[Path] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``, which is created; a process may enter it again.

    The system releases the lock when the process ends, however it ends.

    Raises:
      ConfigError: another process is in ``folder``; names it, its host and since when. Or
        ``folder`` cannot be written.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        yield
        return
    descriptor = _take(path, folder)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    who = f"process {os.getpid()} on {socket.gethostname()} since {now}"
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, who.encode())
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _take(path: Path, folder: Path) -> int:
    """The descriptor of the locked file ``path``."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"workdir={str(folder)!r}: cannot be written: {error.strerror}"
            ) from None
        try:
            _lock(descriptor, folder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a process that removed it at its end: lock the new one


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        raise ConfigError(
            f"workdir={str(folder)!r}: {who} runs in it: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder}: {error.strerror}: a second run in this folder would not be noticed",
            stacklevel=5,
        )
