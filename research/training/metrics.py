"""Metrics: JSON lines are the record, TensorBoard the view."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.summary import scalar

from research.files import parse_json, write_text
from research.training.disk import writing

_SHOWN_EVERY = 30.0  # seconds until the board shows a point


class Metrics:
    """``metrics.jsonl`` (what was computed, reproducible to the bit), ``timing.jsonl`` (how fast,
    and where the time went: `research.training.goodput`) and ``tensorboard/`` in ``workdir``.

    Opening at ``step`` drops what an interrupted run wrote after it, so that a resumed run's record
    is that of an uninterrupted one. tensorboardX's `SummaryWriter` is not used: it writes in a
    thread, which a full disk kills, from a queue, which the loop would then wait for without end.

    Raises:
      WriteError: on opening and writing.
    """

    def __init__(self, workdir: Path, step: int):
        self._place = workdir
        self._files = {}
        with writing(workdir):
            for name in ("metrics", "timing"):
                path = workdir / f"{name}.jsonl"
                # The last line of a killed run may be half written, so the file is written anew.
                write_text(path, "".join(line + "\n" for line in _until(path, step)))
                self._files[name] = path.open("a")
            board = workdir / "tensorboard"
            board.mkdir(exist_ok=True)
            self._board = EventsWriter(str(board / "events"))
            # what an interrupted run has shown from here on is taken back
            begin = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._point(begin)
            self._board.flush()
            self._shown = time.monotonic()

    def write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of ``name`` ("metrics" or "timing"), and its points on the board.

        Lists (an expert's share each) have no point there.
        """
        row: dict[str, Any] = {"step": step, **values}
        with writing(self._place):
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()
            for field, value in values.items():
                if not isinstance(value, list):
                    self._point(Event(step=step, summary=scalar(f"{name}/{field}", value)))
            if time.monotonic() - self._shown >= _SHOWN_EVERY:  # it syncs the disk
                self._board.flush()
                self._shown = time.monotonic()

    def close(self) -> None:
        for file in (*self._files.values(), self._board):
            with contextlib.suppress(OSError):  # what failed to be written was told by `write`
                file.close()

    def _point(self, event: Event) -> None:
        event.wall_time = time.time()
        self._board.write_event(event)


def _until(path: Path, step: int) -> list[str]:
    """The complete lines of ``path`` that are of no later step."""
    if not path.exists():
        return []
    lines = path.read_text().rpartition("\n")[0].splitlines()
    rows = (parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1))
    return [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
