"""What several commands read from their options, and how they run quietly."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from layers.config import ConfigError, check

# folders below RUN that are searched for a model: ARM/SEED, and a stage of an arm with several
_DEPTH = 3


def number(kind, option: str, text: str):
    """``text`` as ``kind``, int or float; raises `ConfigError`."""
    try:
        return kind(text)
    except ValueError:
        name = "an integer" if kind is int else "a number"
        raise ConfigError(f"{option}={text!r}: must be {name}") from None


def model_folder(run: Path) -> Path:
    """The folder with a model: ``run``, or the only such folder below it.

    Raises:
      ConfigError: there is no such folder, or there are several; the message names them.
    """
    check(run.is_dir(), "run", str(run), "is not a folder")
    if (run / "config.json").is_file():
        return run
    depths = ("/".join(["*"] * depth) for depth in range(1, _DEPTH + 1))
    folders = sorted(
        path.parent
        for depth in depths
        for path in run.glob(f"{depth}/config.json")
        if (path.parent / "checkpoints").is_dir()
    )
    check(len(folders) > 0, "run", str(run), "holds no trained model")
    names = ", ".join(str(path.relative_to(run)) for path in folders)
    check(len(folders) == 1, "run", str(run), f"holds several models; add one of {names}")
    print(f"ablate: {folders[0]}", file=sys.stderr)
    return folders[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard the standard error of the process: libtpu reports there that it found no TPU."""
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
