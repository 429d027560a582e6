"""Metrics of a run: JSON lines as the record, and TensorBoard events for viewing."""

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

_SHOWN_EVERY = 30.0  # seconds between two writes to TensorBoard


class Metrics:
    """Writes the metrics of a run to ``workdir``.

    ``metrics.jsonl``: what was computed, reproducible bit for bit. ``timing.jsonl``: speed, and the
    seconds of `research.training.goodput`. ``tensorboard/``: the same numbers for viewing.

    Opening at ``step`` removes what an interrupted run wrote after that step, so that the record of
    a resumed run is that of an uninterrupted one. tensorboardX's `SummaryWriter` is not used: it
    writes from a queue in a thread. A full disk ends the thread, and the loop would then wait for
    the queue forever.

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
            board = workdir / "tensorboard"
            board.mkdir(exist_ok=True)
            self._board = EventsWriter(str(board / "events"))
            # TensorBoard drops the points of an interrupted run after this step
            begin = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._point(begin)
            self._board.flush()
            self._shown = time.monotonic()

    def write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to ``name`` ("metrics" or "timing"), and write its points to TensorBoard.

        Lists (e.g. tokens per expert) are not written to TensorBoard.
        """
        row: dict[str, Any] = {"step": step, **values}
        with writing(self._workdir):
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()
            for field, value in values.items():
                if not isinstance(value, list):
                    self._point(Event(step=step, summary=scalar(f"{name}/{field}", value)))
            if time.monotonic() - self._shown >= _SHOWN_EVERY:  # flush syncs the disk
                self._board.flush()
                self._shown = time.monotonic()

    def close(self) -> None:
        for file in (*self._files.values(), self._board):
            with contextlib.suppress(OSError):  # `write` has raised the error already
                file.close()

    def _point(self, event: Event) -> None:
        event.wall_time = time.time()
        self._board.write_event(event)


def _until(path: Path, step: int) -> list[str]:
    """The complete lines of ``path`` up to ``step``."""
    if not path.exists():
        return []
    lines = path.read_text().rpartition("\n")[0].splitlines()
    rows = (parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1))
    return [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
