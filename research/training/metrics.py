"""Metrics: JSON lines are the record, TensorBoard the view."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class Metrics:
    """``metrics.jsonl`` (what was computed, reproducible to the bit), ``timing.jsonl`` (how fast,
    and where the time went: `research.training.goodput`) and ``tensorboard/`` in ``workdir``.

    Opening at ``step`` drops what an interrupted run wrote after it, so that a resumed run's record
    is that of an uninterrupted one.
    """

    def __init__(self, workdir: Path, step: int):
        self._files = {}
        for name in ("metrics", "timing"):
            path = workdir / f"{name}.jsonl"
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
            # The last line of a killed run may be half written, so the file is written anew.
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(line + "\n" for line in kept))
            fresh.replace(path)
            self._files[name] = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of ``name`` ("metrics" or "timing"), and its points on the board.

        Lists (an expert's share each) have no point there.
        """
        row: dict[str, Any] = {"step": step, **values}
        self._files[name].write(json.dumps(row) + "\n")
        self._files[name].flush()
        for field, value in values.items():
            if not isinstance(value, list):
                self._board.add_scalar(f"{name}/{field}", value, step)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()


def _lines(path: Path) -> list[str]:
    """The complete lines of ``path``."""
    if not path.exists():
        return []
    return path.read_text().rpartition("\n")[0].splitlines()
