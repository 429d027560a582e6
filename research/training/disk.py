"""Write errors: a disk that is full, gone or read-only ends a run with one line."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


class WriteError(OSError):
    """A file of the run could not be written; the message names the path and the reason.

    Only the steps since the last complete checkpoint are lost. The same call resumes from that
    checkpoint when the disk can be written again.
    """


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise `WriteError` with ``place``, a path, if the system cannot write inside."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteError(
            f"{place}: cannot be written: {reason}; when it can, the same command resumes from the "
            "last complete checkpoint"
        ) from None


def _reason(error: Exception) -> str | None:
    """The system's reason for ``error``, which libraries may give only in its text; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if code := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
        return os.strerror(int(code[1]))
    if status := re.match(r"([A-Z_]+): .*\bError writing", str(error)):
        return status[1].lower().replace("_", " ")  # e.g. the folder was removed during the write
    if str(error).startswith("Checkpoint directory does not exist"):  # Orbax
        return os.strerror(errno.ENOENT)
    return None
