"""The board's file holds what tensorboardX's own writer would have put there."""

import struct

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from research.training.metrics import Metrics


def events(folder):
    (path,) = folder.iterdir()
    rest, found = path.read_bytes(), []
    while rest:
        (size,) = struct.unpack("<Q", rest[:8])  # then a checksum of 4 bytes, and one after
        event = Event.FromString(rest[12 : 12 + size])
        event.wall_time = 0
        found.append(event)
        rest = rest[16 + size :]
    return found


def test_the_board_is_tensorboards(tmp_path):
    values = {"loss": 2.5, "share": [0.5, 0.5]}
    records = Metrics(tmp_path, 7)
    records.write("metrics", 8, values)
    records.write("timing", 8, {"tokens_per_second": 3})
    records.close()
    board = SummaryWriter(str(tmp_path / "theirs"), purge_step=8)
    board.add_scalar("metrics/loss", 2.5, 8)
    board.add_scalar("timing/tokens_per_second", 3, 8)
    board.close()
    ours, theirs = events(tmp_path / "tensorboard"), events(tmp_path / "theirs")
    # theirs states the version a second time, when it takes back what was shown
    assert ours == [theirs[0], *theirs[2:]]
