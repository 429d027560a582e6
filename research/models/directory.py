"""Directories that appear whole or not at all, and never over another."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from layers.config import check


def check_new(directory: Path) -> None:
    """Raise `ConfigError` unless ``directory`` is absent or empty."""
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    check(not occupied, "directory", str(directory), "is there and not empty")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A folder to fill beside ``directory``, which takes its name on success and goes on failure.

    Raises:
      ConfigError: ``directory`` is there and not empty.
    """
    check_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        os.replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
