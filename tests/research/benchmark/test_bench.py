"""The command: records, absences, tuning, and requests that cannot be; with a stand-in op."""

import json

import jax
import pytest

from pallas_kernels import blocks
from research import cli
from research.benchmark import measure, ops, record, run, tune
from research.benchmark.peers import PEERS


def test_bench_records_merges_draws_and_names_what_is_absent(stand_in, capsys):
    out = stand_in / "results" / "cpu.json"
    arguments = ["double", "--cases=small", "--rounds=3"]
    assert cli.main(["bench", *arguments, f"--out={out}"]) == 0
    assert cli.main(["bench", "double", "--rounds=3", "--record"]) == 0
    written = json.loads(out.read_text())["double"]
    assert list(written["cases"]) == ["small", "big"]
    for which in run.PASSES:
        rows = written["cases"]["small"][which]
        assert rows["sum"]["rounds"] == 3 and rows["sum"]["temp_bytes"] is not None
        assert len(rows["sum"]["times"]) == 3
        assert rows["gone"] == {"absent": "skipped: else-where is not installed"}
        assert rows["broken"]["absent"].startswith("failed: TypeError")
        assert "0.5 of the norm away from ours/xla's" in rows["wrong"]["absent"]
        assert rows["ours/xla"]["best_peer"] == "sum"
        assert list(rows["ours/xla"]["times_as_fast_as"]) == ["sum", "ours/reference"]
    # forward: 8 numbers of 4 bytes in and out; both: those again, with dy and its gradient
    rates = [written["cases"]["small"][p]["sum"] for p in run.PASSES]
    moved = [row["bytes_per_second"] * row["median"] for row in rates]
    flops = [row["flops_per_second"] * row["median"] for row in rates]
    assert moved == pytest.approx([64, 160]) and flops == pytest.approx([4, 8])
    machine = written["machine"]
    assert {"jax", "numpy"} < set(machine["packages"]) and "else-where" not in machine["packages"]
    assert (stand_in / "results/cpu-double.png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".md").read_text()
    shown = capsys.readouterr().out
    for text in (page, shown):
        assert "double small, forward+backward (n=8 dtype=float32)" in text
        assert "big, forward: gone skipped: else-where is not installed" in text
    assert "| sum |" in page and "| best |" in page


def test_one_that_fails_in_a_timed_round_is_listed_by_name(stand_in):
    asked = run.request("double", cases=["small"])
    found = run.bench(asked, rounds=3, budget=measure.Budget(60, asked.parts))
    rows = found["cases"]["small"][run.PASSES[0]]
    assert rows["late"] == {"absent": "failed: RuntimeError: lost"}
    assert rows["sum"]["rounds"] == 3


def test_what_the_budget_does_not_reach_is_listed(stand_in, ticks):
    asked = run.request("double")
    found = run.bench(asked, budget=measure.Budget(1e-3, asked.parts, ticks))
    rows = found["cases"]["big"][run.PASSES[1]]
    assert rows["ours/xla"] == rows["sum"] == {"absent": "not run: budget"}
    assert rows["gone"]["absent"].startswith("skipped")
    assert record.tables(found) == [] and "Nothing was timed." in record.markdown({"o": found}, "x")


def test_all_runs_what_is_there_the_large_last(stand_in, monkeypatch):
    double = ops.OPS["double"]
    large = double._replace(flops=lambda case: 1e9)
    monkeypatch.setattr(ops, "OPS", {"large": large, "double": double})
    monkeypatch.setitem(PEERS, "large", {"cpu": {}})
    assert cli.main(["bench", "--all", "--record", "--rounds=1"]) == 0
    written = json.loads((stand_in / "results/cpu.json").read_text())
    assert list(written) == ["double", "large"]
    rows = written["large"]["cases"]["small"][run.PASSES[0]]
    assert rows["ours/xla"]["best_peer"] is None and rows["ours/reference"]["rounds"] == 1
    page = (stand_in / "results/cpu.md").read_text()
    assert "## double" in page and "(cpu-large.png)" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doubel"], "did you mean 'double'?"),
        ([], "op=None: name one of"),
        (["double", "--all"], "give --all alone"),
        (["double", "--cases=smal"], "did you mean 'small'?"),
        (["double", "--cases=none"], "cases=[]: must name at least one"),
        (["double", "--peers=sun"], "did you mean 'sum'?"),
        (["double", "--implementations=xlb"], "did you mean 'xla'?"),
        (["double", "--rounds=0"], "rounds=0: must be from 1 to 10000"),
        (["double", "--rounds=x"], "invalid int value: 'x'"),
        (["double", "--seconds=0"], "seconds=0.0: must be > 0"),
        (["double", "--budget=nan"], "budget=nan: must be > 0 and finite"),
        (["double", "--shape=n=0"], "shape.n=0: must be an integer from 1 to 16777216"),
        (["double", "--shape=m=4"], "shape.m=4: no such size; known: n"),
        (["double", "--shape=n"], "--shape=n: must be integer sizes"),
        (["double", "--shape=n=1.5"], "--shape=n=1.5: must be integer sizes"),
        (["double", "--dtype=float23"], "did you mean 'float32'?"),
        (["double", "--record", "--dtype=float32"], "--record: runs everything; leave out --dtype"),
        (["--all", "--cases=small"], "--all: runs everything; leave out --cases"),
        (["--all", "--tune"], "--all: name one op to --tune"),
        (["double", "--tune", "--cases=small,big"], "name one to --tune on"),
        (["grouped_matmul", "--tune", "--cases=e8"], "it has no block sizes to tune on a cpu"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(stand_in, capsys, arguments, said):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_inputs_that_do_not_fit_are_refused_before_they_are_made(stand_in, monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda: 100)
    with pytest.raises(ValueError, match="cases='n16777216': its inputs are 0.1 GB, must be"):
        run.request("double", shape={"n": 2**24})


def test_a_shape_and_a_dtype_replace_the_first_cases(stand_in):
    asked = run.request("double", shape={"n": 4}, dtype="bfloat16")
    assert asked.cases == {"n4": {"n": 4, "dtype": "bfloat16"}} and asked.parts == 2


def test_an_op_that_is_not_there_is_not_listed(monkeypatch):
    monkeypatch.setitem(ops.OPS, "later", ops.OPS["wkv4"]._replace(module="not_written_yet"))
    assert "later" not in ops.known() and {"wkv4", "wkv7"} < set(ops.known())


@pytest.mark.parametrize("name", list(ops.known()))
def test_every_op_takes_its_arrays(name):
    """Ours, and the peers that are JAX alone, give one output of one shape."""
    op = ops.OPS[name]
    for platform, cases in op.cases.items():
        for case in cases.values():
            arrays = jax.eval_shape(lambda op=op, case=case: op.arrays(case))
            y = jax.eval_shape(ops.ours(name, "xla"), *arrays)
            assert y.dtype == case["dtype"] and op.flops(case) > 0
            for peer in PEERS[name][platform].values():
                assert peer.package and peer.module
    for platform, tuning in op.tuning.items():
        assert tuning.case in op.cases[platform]
        present = blocks.table(op.module)[platform]
        assert set(tuning.grid) <= set(present)


def test_tuning_tries_the_grid_and_writes_this_chips_row(stand_in, monkeypatch, capsys):
    seen = []
    real = tune.of_jax

    def slow_unless_two(function):
        one = real(function)

        def prepare(arrays, backward):
            assert backward and arrays[0].shape == (16,)  # the tuning case
            return one.prepare(arrays, backward)

        return one._replace(prepare=prepare)

    def ours(name, implementation, sizes=None):
        seen.append((implementation, dict(sizes or {})))
        return lambda x: 2 * x

    def times(runs, *_):
        # in the order of the grid: present, then query=1, query=2
        return {name: [{"0": 4.0, "1": 5.0, "2": 3.0}[name]] * 2 for name in runs}, {}

    monkeypatch.setattr(tune, "of_jax", slow_unless_two)
    monkeypatch.setattr(tune, "ours", ours)
    monkeypatch.setattr(measure, "interleave", times)
    assert cli.main(["bench", "double", "--tune"]) == 0
    expected = [{"query": q, "key": 512} for q in (512, 1, 2)]
    assert seen[1:] == [("xla", sizes) for sizes in expected]
    table = json.loads(blocks.path("double").read_text())
    assert table == {"cpu": {"query": 2, "key": 512}, "tpu": {"query": 64}}
    assert blocks.block_sizes("double", "cpu")["query"] == 2  # the cache forgot
    shown = capsys.readouterr().out
    assert "query=2 key=512" in shown and "best" in shown and "row 'cpu'" in shown


def test_a_tie_within_the_spread_keeps_the_present_row(stand_in, monkeypatch, capsys):
    before = blocks.path("double").read_text()
    monkeypatch.setattr(
        measure, "interleave", lambda runs, *_: ({n: [3 + 0.1 * int(n), 2.9] for n in runs}, {})
    )
    assert cli.main(["bench", "double", "--tune"]) == 0
    assert blocks.path("double").read_text() == before
    assert "is left as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(4, 4, 4), (3, 3, 3.9), (5, 5, 5)], 1),
        ([(4, 3.8, 4.2), (3.9, 3.7, 4.0)], 0),
        ([(4, 4, 4), None, (2, 2, 2)], 2),
        ([(4, 4, 4)], 0),
    ],
)
def test_choose(rows, best):
    shown = [
        {"absent": "failed"} if row is None else {"median": row[0], "quartiles": list(row[1:])}
        for row in rows
    ]
    assert tune.choose(shown) == best


def test_sizes_that_fail_are_listed_and_present_ones_must_not(stand_in, monkeypatch):
    def ours(name, implementation, sizes=None):
        if sizes == bad:
            raise MemoryError("too large")
        return lambda x: 2 * x

    monkeypatch.setattr(tune, "ours", ours)
    asked = run.request("double", cases=["big"])
    effort = {"rounds": 1, "seconds": 1.0}
    bad = {"query": 1, "key": 512}
    found = tune.tune(asked, **effort, budget=measure.Budget(60, 1))
    assert found.rows[1] == {"sizes": bad, "absent": "failed: MemoryError: too large"}
    bad = {"query": 512, "key": 512}
    with pytest.raises(ValueError, match="op='double': xla with the present block sizes failed"):
        tune.tune(asked, **effort, budget=measure.Budget(60, 1))


def test_a_chip_has_a_file():
    assert record.path("NVIDIA H200").name == "nvidia-h200.json"
