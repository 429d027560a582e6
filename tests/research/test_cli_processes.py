"""``ablate run`` as two processes is ``ablate run`` as one."""

import json
import sys

import pytest

from tests.conftest import ROOT, finish_together, start_together

# experiments of the package, for what the command line has no option for
COMMAND = "import sys; from research.cli import main; sys.exit(main(package=sys.argv.pop(1)))"
PAIR = '''"""Fails, where it is told to (Nobody 2020)."""
import json, os
import jax
from ml_collections import ConfigDict
from research.ablation import Arm, Claim, mean

PAPER, MATCHED, SEEDS = "Nobody 2020, arXiv:0000.00000", "steps", (0,)
CODE = (__name__.replace(".", "/") + ".py",)
ARMS = (Arm("first"), Arm("second", {"steps": 2}), Arm("last", {"steps": 3}, after=("first",)))
CLAIMS = (Claim("small", "It is small", "", mean("loss", "second"), "<", 3.0),)

def get_config(scale):
    return ConfigDict(dict(steps=1))

def run(unit):
    with open(unit.workdir / f"ran{jax.process_index()}", "a") as ran:
        ran.write("once ")
    if unit.after:
        json.loads((unit.after["first"] / "result.json").read_text())
    if unit.arm == "first" and str(jax.process_index()) in os.environ["FAIL"]:
        raise RuntimeError(f"process {jax.process_index()} fell over")
    return {"loss": float(unit.config.steps)}
'''


def run(package, tmp_path, name, processes, *options, **variables):
    command = [sys.executable, "-c", COMMAND, package, "run", name]
    started = start_together(
        [*command, "--scale=smoke", f"--workdir={tmp_path / 'work'}", *options],
        processes,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        GLIBC_TUNABLES="glibc.malloc.hugetlb=0",  # as is: it would start itself again
        **variables,
    )
    return finish_together(started)


@pytest.mark.slow
def test_two_processes_run_units_once_and_one_writes(make_package, tmp_path):
    package, work = make_package(pair=PAIR), tmp_path / "work"
    for _ in range(2):
        first, second = run(package, tmp_path, "branch/pair", 2, FAIL="")
        assert first[0] == second[0] == 0, first[2] + second[2]
        assert "unit 3 of 3: last, seed 0: " in first[1] and "written:" in first[1]
        assert "unit" not in second[1] and "written" not in second[1]
        summary = json.loads((work / "summary.json").read_text())
        assert [unit["arm"] for unit in summary["units"]] == ["first", "second", "last"]
        ran = [path.read_text() for path in sorted(work.glob("*/seed0/ran*"))]
        assert ran == ["once "] * 6
    assert "last, seed 0: finished before" in first[1]


@pytest.mark.parametrize("where", ["1", pytest.param("01", marks=pytest.mark.slow)])
def test_a_unit_that_fails_in_one_process_has_failed_in_both(make_package, tmp_path, where):
    package, work = make_package(pair=PAIR), tmp_path / "work"
    first, second = run(package, tmp_path, "branch/pair", 2, FAIL=where)
    assert first[0] == second[0] == 1, first[2] + second[2]
    failed = json.loads((work / "first/seed0/failed.json").read_text())
    assert failed["error"] == f"RuntimeError: process {where[0]} fell over"
    # the others went on, but for what starts from it
    assert (work / "second/seed0/result.json").exists()
    last = json.loads((work / "last/seed0/failed.json").read_text())
    assert "arm 'first' of the same seed did not finish" in last["error"]
    first, second = run(package, tmp_path, "branch/pair", 2, FAIL="")
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "second, seed 0: finished before" in first[1] and "written:" in first[1]
    assert "unit" not in second[1] and "written" not in second[1]


@pytest.mark.slow
def test_a_request_that_cannot_be_served_ends_both(make_package, tmp_path):
    for code, _, error in run(make_package(), tmp_path, "branch/wide", 2, "--arms=wd"):
        assert code == 2 and error.splitlines()[-1].startswith("ablate: "), error


@pytest.mark.slow
def test_a_trained_experiment_gives_the_same_as_one_process(tmp_path):
    def losses(processes, work):
        options = ("--arms=rotary", "--seeds=0")
        mesh = ("--config.mesh.data=4", "--config.mesh.tensor=2")
        place = tmp_path / work
        place.mkdir()
        ended = run("experiments", place, "architecture/rope", processes, *options, *mesh)
        assert [code for code, *_ in ended] == [0] * processes, ended[0][2][-3000:]
        units = json.loads((place / "work/summary.json").read_text())["units"]
        assert [unit["arm"] for unit in units] == ["rotary"]
        return [units[0]["metrics"][name] for name in ("loss", "longer_loss")]

    assert losses(2, "two") == pytest.approx(losses(1, "one"), rel=1e-5)
