"""What is said of a plan."""

from research.planning import report


def test_bytes_are_readable():
    bytes_ = report._bytes
    assert [bytes_(n) for n in (0, 1023, 2048, -3 * 2**20, 95.73 * 2**30, 2**41)] == [
        "0 B", "1,023 B", "2 KiB", "-3 MiB", "95.73 GiB", "2,048.00 GiB",
    ]  # fmt: skip
