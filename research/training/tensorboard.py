"""The events of a run for TensorBoard.

`research.training.metrics` imports this file when it opens a workdir, because tensorboardX imports
torch if that is installed, which takes seconds.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.summary import scalar

_SHOWN_EVERY = 30.0  # seconds between two writes to the disk


class TensorBoard:
    """Writes points to an event file in ``folder``, and makes the folder.

    TensorBoard drops the points of an interrupted run after ``step``. tensorboardX's
    `SummaryWriter` is not used: it writes from a queue in a thread. A full disk ends the thread,
    and the loop would then wait for the queue forever.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._point(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each of ``values``."""
        for name, value in values.items():
            self._point(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._shown >= _SHOWN_EVERY:
            self._flush()

    def close(self) -> None:
        self._events.close()

    def _point(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def _flush(self) -> None:
        self._events.flush()  # syncs the disk
        self._shown = time.monotonic()
