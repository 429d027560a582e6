"""A few mutations of each kind of file, and that the fuzzer finds what it is to find."""

import time

import pytest

from layers.config import ConfigError
from tests import fuzz
from tests.fuzzing.kinds import KINDS, Kind
from tests.fuzzing.mutate import of_json


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name):
    kind = KINDS[name]()
    for content in kind.seeds:
        assert fuzz.outcome(kind, content) == "read"
    outcomes = [fuzz.outcome(kind, fuzz.content_of(kind, name, 1, n)) for n in range(250)]
    assert set(outcomes) == {"read", "refused"}


def raising(error):
    def read(content):
        raise error

    return read


@pytest.mark.parametrize(
    "read, found",
    [
        (lambda content: None, "read"),
        (raising(ConfigError("a=1: must be 2")), "refused"),
        (raising(ConfigError("two\nlines")), "a message that is not one short line"),
        (raising(KeyError("a")), "KeyError at test_fuzz.py:"),
        (raising(RecursionError("deep")), "RecursionError at test_fuzz.py:"),
        (lambda content: time.sleep(9), "TimeoutError at "),
    ],
)
def test_what_is_neither_is_found(read, found, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    assert fuzz.outcome(Kind([b"{}"], of_json, read, ["a"]), b"{}").startswith(found)


def test_a_failure_is_stored_and_replayed(monkeypatch, tmp_path, capsys):
    """Of a process that prints what it does, and then ends before its time."""
    kind = Kind([b'{"a": 1}'], of_json, raising(KeyError("a")), ["a"])
    monkeypatch.setitem(fuzz.KINDS, "broken", lambda: kind)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "start = int(sys.argv[-1].partition('=')[2])\n"
        "for number in range(start, 6):\n"
        "    print(number, flush=True)\n"
        "    if number == 3: sys.exit(7)\n"
        "    print('KeyError at a.py:1: a' if number == 1 else 'refused', flush=True)\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(script))
    failures = tmp_path / "runs/failures"
    assert fuzz.fuzz("broken", 0, 6, failures) == 2
    printed = capsys.readouterr().out
    assert "broken seed 0: 6/6" in printed and "0 read, 4 refused, 2 failed" in printed
    stored = sorted(path.name for path in failures.iterdir())
    assert stored == ["broken.0.1", "broken.0.3"]
    assert (failures / "broken.0.1").read_bytes() == fuzz.content_of(kind, "broken", 0, 1)
    with pytest.raises(KeyError):
        fuzz.replay(failures / "broken.0.1")
