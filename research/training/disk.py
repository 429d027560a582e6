"""Writing that can fail: a disk that is full, gone or read-only ends a run with one line."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


class WriteError(OSError):
    """What a run has to write could not be written; the message says where and why.

    Nothing is lost but the steps since the last complete checkpoint: once there is room, the same
    call goes on from there.
    """


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise `WriteError`, which names ``place``, for an error of the system inside."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteError(
            f"{place}: cannot be written: {reason}; once it can, the same command goes on from the "
            "last complete checkpoint"
        ) from None


def _reason(error: Exception) -> str | None:
    """What the system said, if it was the system: others tell it only in their text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if code := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
        return os.strerror(int(code[1]))
    if status := re.match(r"([A-Z_]+): .*\bError writing", str(error)):
        return status[1].lower().replace("_", " ")  # what it wrote into has gone meanwhile
    if str(error).startswith("Checkpoint directory does not exist"):  # Orbax
        return os.strerror(errno.ENOENT)
    return None
