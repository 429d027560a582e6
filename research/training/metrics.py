"""Metrics of a run: JSON lines as the record, and TensorBoard events for viewing."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.files import read_lines, write_text
from research.training.disk import writing


class Metrics:
    """Writes the metrics of a run to ``workdir``.

    ``metrics.jsonl``: what was computed, reproducible bit for bit. ``timing.jsonl``: speed, and the
    seconds of `research.training.goodput`. ``tensorboard/``: the same numbers for viewing.

    Opening at ``step`` removes what an interrupted run wrote after that step, so that the record of
    a resumed run is that of an uninterrupted one.

    Raises:
      WriteError: on opening and writing.
    """

    def __init__(self, workdir: Path, step: int):
        self._workdir = workdir
        self._files = {}
        with writing(workdir):
            for name in ("metrics", "timing"):
                path = workdir / f"{name}.jsonl"
                # Rewrite the file: the last line of a killed run may be incomplete.
                write_text(path, "".join(line + "\n" for line in _until(path, step)))
                self._files[name] = path.open("a")
            from research.training.tensorboard import TensorBoard  # slow where torch is installed

            self._events = TensorBoard(workdir / "tensorboard", step)

    def write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to ``name`` ("metrics" or "timing"), and write its points to TensorBoard.

        Lists (e.g. tokens per expert) are not written to TensorBoard.
        """
        row: dict[str, Any] = {"step": step, **values}
        with writing(self._workdir):
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()
            points = {
                f"{name}/{field}": v for field, v in values.items() if not isinstance(v, list)
            }
            self._events.write(step, points)

    def close(self) -> None:
        for file in (*self._files.values(), self._events):
            with contextlib.suppress(OSError):  # `write` has raised the error already
                file.close()


def _until(path: Path, step: int) -> list[str]:
    """The complete lines of ``path`` up to ``step``."""
    if not path.exists():
        return []
    rows = read_lines(path, {"step": int}, "delete its folder to run it again")
    return [json.dumps(row) for row in rows if row["step"] <= step]
