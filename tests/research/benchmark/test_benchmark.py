"""The harness: turns, names, absent peers, merging; with a stand-in op beside the real ones."""

import itertools
import json

import jax.numpy as jnp
import pytest

from research import cli
from research.benchmark import measure, record, run
from research.benchmark.ops import OPS, Op
from research.benchmark.peers import PEERS


@pytest.fixture
def stand_in(monkeypatch):
    """An op ``double`` with one peer that works, and one that is not installed."""

    def missing(x):
        raise ModuleNotFoundError("No module named 'elsewhere'")

    case = {"n": 8, "dtype": "float32"}
    op = Op(lambda c: [jnp.ones(c["n"])], lambda c: 1.0, {"cpu": {"small": case}}, 2.0)
    monkeypatch.setitem(OPS, "double", op)
    monkeypatch.setitem(PEERS, "double", {"cpu": {"sum": lambda x: x + x, "gone": missing}})
    monkeypatch.setattr(run, "ours", lambda name, implementation: lambda x: 2 * x)
    ceilings = {"flops_per_second": 1.0, "bytes_per_second": 1.0}
    monkeypatch.setattr(measure, "ceilings", lambda *_: ceilings)


def test_each_runs_in_turn_and_sits_out_when_its_time_is_spent():
    calls, clock = [], itertools.count()
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times, failed = measure.interleave(runs, 3, 100.0, lambda: float(next(clock)))
    assert "".join(calls) == "abc" * 4 and not failed
    assert times == {name: [1.0] * 3 for name in "abc"}
    times, _ = measure.interleave(runs, 9, 3.0, lambda: float(next(clock)))
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_describe_gives_median_and_quartiles():
    expected = {"median": 3, "quartiles": [2, 4], "rounds": 5}
    assert measure.describe([5, 1, 4, 2, 3]) == expected


def test_both_passes_is_the_gradient_by_floating_arrays_alone():
    arrays = [jnp.array([2.0, 3.0]), jnp.array([1, 2])]
    gradient = measure.both_passes(lambda x, n: x**2 * n, arrays, jnp.array([1.0, 10.0]))(*arrays)
    assert len(gradient) == 1 and gradient[0].tolist() == [4.0, 120.0]


def test_bench_records_merges_draws_and_names_what_is_absent(stand_in, tmp_path, capsys):
    out = tmp_path / "cpu.json"
    out.write_text('{"other": {"kept": 1}}')
    assert cli.main(["bench", "double", "--rounds=3", f"--out={out}"]) == 0
    written = json.loads(out.read_text())
    assert written["other"] == {"kept": 1}
    for which in run.PASSES:
        rows = written["double"]["cases"]["small"][which]
        assert rows["sum"]["rounds"] == 3 and rows["sum"]["temp_bytes"] is not None
        assert "No module named 'elsewhere'" in rows["gone"]["absent"]
        assert list(rows["ours/xla"]["times_as_fast_as"]) == ["sum"]
    assert (tmp_path / "cpu-double.png").read_bytes().startswith(b"\x89PNG")
    assert "small, forward: gone absent: ModuleNotFoundError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doubel"], "did you mean 'double'?"),
        (["double", "--cases=smal"], "did you mean 'small'?"),
        (["double", "--peers=sun"], "did you mean 'sum'?"),
        (["double", "--implementations=xlb"], "did you mean 'xla'?"),
        (["double", "--rounds=0"], "rounds=0"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(stand_in, capsys, arguments, said):
    assert cli.main(["bench", *arguments, "--no-record"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_chip_has_a_file():
    assert record.path("NVIDIA H200").name == "nvidia-h200.json"
