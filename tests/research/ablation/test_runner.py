import errno
import fcntl
import io
import json
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from layers.config import ConfigError
from research import lock
from research.ablation import language_model, load, runner
from research.ablation.language_model import load_source
from research.ablation.progress import Progress
from tests.conftest import ROOT
from tests.research.conftest import SOURCE


@pytest.fixture
def experiment(make_package):
    return load("branch/wide", make_package())


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def execute(planned):
    return runner.execute(planned, Progress(Console(file=io.StringIO())))


def log(work):
    return (work / "log").read_text().splitlines()


def test_order_sources_and_configs(experiment, work):
    planned = runner.plan(experiment, "cpu", work, arms=["tuned"], seeds=[1, 0])
    assert [(u.arm, u.seed) for u in planned.units] == [
        ("wide", 1), ("tuned", 1), ("wide", 0), ("tuned", 0),
    ]  # fmt: skip
    wide, tuned = planned.units[:2]
    assert tuned.after == {"wide": wide.workdir} == {"wide": work / "wide" / "seed1"}
    assert wide.after == {}
    assert (wide.config.model.width, wide.config.steps, tuned.config.steps) == (8, 3, 5)
    assert wide.config.is_locked


def test_runs_then_skips_what_is_finished(experiment, work):
    planned = runner.plan(experiment, "cpu", work)
    assert execute(planned) == {}
    before = {path: path.read_bytes() for path in work.rglob("result.json")}
    assert len(before) == 9
    assert execute(runner.plan(experiment, "cpu", work)) == {}
    assert len(log(work)) == 9
    assert before == {path: path.read_bytes() for path in work.rglob("result.json")}
    assert runner.results(planned).metric("wide", "curve").shape == (3, 2)


def test_an_interrupted_run_goes_on_where_it_was(experiment, work, monkeypatch):
    planned = runner.plan(experiment, "cpu", work)
    monkeypatch.setenv("FAKE_TRAP", "wide/1/1/interrupt")
    with pytest.raises(KeyboardInterrupt):
        execute(planned)
    states = [runner.state(unit) for unit in planned.units]
    assert states == ["finished"] * 4 + ["interrupted"] + ["new"] * 4
    monkeypatch.delenv("FAKE_TRAP")
    assert execute(runner.plan(experiment, "cpu", work)) == {}
    assert log(work)[4:6] == ["wide 1 from 0", "wide 1 from 2"]
    assert len(log(work)) == 10


def test_a_failed_unit_does_not_stop_the_others(experiment, work, monkeypatch):
    planned = runner.plan(experiment, "cpu", work, seeds=[0])
    monkeypatch.setenv("FAKE_TRAP", "wide/0/0/fail")
    failures = execute(planned)
    assert failures["wide", 0] == "RuntimeError: lost"
    assert "did not finish" in failures["tuned", 0]
    assert [runner.state(u) for u in planned.units] == ["finished", "failed", "failed"]
    failed = json.loads((work / "wide/seed0/failed.json").read_text())
    assert "Traceback" in failed["traceback"]
    monkeypatch.delenv("FAKE_TRAP")
    assert execute(planned) == {}
    assert not (work / "wide/seed0/failed.json").exists()


SEVERAL = (
    SOURCE[: SOURCE.index("ARMS =")]
    + """
def merge(unit):
    assert list(unit.after) == ["wide", "narrow"]
    found = [json.loads((f / "result.json").read_text())["metrics"] for f in unit.after.values()]
    return {"loss": sum(one["loss"] for one in found), "sources": len(found)}

ARMS = (
    Arm("narrow"),
    Arm("alone"),
    Arm("wide", {"model.width": 8}),
    Arm("merged", after=("wide", "narrow"), run=merge),
    Arm("tuned", after=("merged",)),
)
CLAIMS = (Claim("low", "It is low", "", mean("loss", "merged"), "<", 9.0),)

def run(unit):
    if os.environ.get("FAKE_TRAP") == unit.arm:
        raise RuntimeError("lost")
    return {"loss": float(unit.config.model.width)}
"""
)


@pytest.fixture
def several(make_package):
    return load("branch/several", make_package(several=SEVERAL))


def test_an_arm_starts_from_several_and_runs_its_own_way(several, work):
    planned = runner.plan(several, "cpu", work, arms=["tuned"], seeds=[2])
    assert [unit.arm for unit in planned.units] == ["narrow", "wide", "merged", "tuned"]
    assert planned.units[2].after == {"wide": work / "wide/seed2", "narrow": work / "narrow/seed2"}
    assert execute(planned) == {}
    found = runner.results(planned)
    assert found.metric("merged", "loss") == 12 and found.metric("merged", "sources") == 2
    assert found.metric("tuned", "loss") == 4  # by the experiment's own run


def test_what_starts_from_one_that_failed_names_it(several, work, monkeypatch):
    monkeypatch.setenv("FAKE_TRAP", "narrow")
    failures = execute(runner.plan(several, "cpu", work, seeds=[0]))
    lost = "RuntimeError: arm {!r} of the same seed did not finish"
    assert failures == {
        ("narrow", 0): "RuntimeError: lost",
        ("merged", 0): lost.format("narrow"),
        ("tuned", 0): lost.format("merged"),
    }


def test_units_that_share_a_source_do_not_run_apart(several, work):
    def parts(*arms):
        return runner.apart(runner.plan(several, "cpu", work, arms=arms or None, seeds=[0]))

    assert parts() == ["--arms=narrow,wide,merged,tuned --seeds=0", "--arms=alone --seeds=0"]
    assert parts("narrow", "wide") == ["--arms=narrow --seeds=0", "--arms=wide --seeds=0"]
    assert parts("wide", "alone", "tuned") == [
        "--arms=alone --seeds=0", "--arms=wide,tuned --seeds=0",
    ]  # fmt: skip


def test_a_source_is_named_where_there_are_several(several, work, monkeypatch):
    monkeypatch.setattr(language_model, "load_model", lambda folder, mesh: folder)
    monkeypatch.setattr(language_model, "_mesh", lambda unit: None)
    *_, merged, tuned = runner.plan(several, "cpu", work, arms=["tuned"], seeds=[0]).units
    with pytest.raises(ConfigError, match="arm=None: .* merged starts from: wide, narrow$"):
        load_source(merged)
    with pytest.raises(ConfigError, match="arm='wyde': .*did you mean 'wide'"):
        load_source(merged, "wyde")
    assert load_source(merged, "wide") == work / "wide/seed0"
    assert load_source(tuned) == work / "merged/seed0"


def test_another_configuration_is_refused_not_overwritten(experiment, work):
    planned = runner.plan(experiment, "cpu", work, arms=["narrow"], seeds=[0])
    execute(planned)
    before = (work / "narrow/seed0/result.json").read_bytes()
    with pytest.raises(ConfigError, match="was run with noise=0.01, now 0.5"):
        runner.plan(experiment, "cpu", work, overrides=["noise=0.5"])
    assert (work / "narrow/seed0/result.json").read_bytes() == before


@pytest.mark.parametrize(
    "override, message",
    [
        ("stepz=3", "stepz: no such field; did you mean 'steps'?"),
        ("model.widht=3", "did you mean 'width'?"),
        ("steps=many", "steps='many': must be int"),
        ("steps=2.5", "steps=2.5: must be int"),
        ("steps={[]: 1}", "steps='{[]: 1}': must be int"),
        ("steps=true", "steps=True: must be int"),
        ("model=3", "model=3: a group"),
        ("steps.x=3", "steps has no fields"),
        ("steps", "--config.field=value"),
    ],
)
def test_bad_overrides(experiment, work, override, message):
    with pytest.raises(ConfigError) as error:
        runner.plan(experiment, "cpu", work, overrides=[override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_overrides_are_typed_and_reach_arms(experiment, work):
    texts = ["noise=1", "model.width=6", "model.window=7", "model.name=3"]
    planned = runner.plan(experiment, "cpu", work, overrides=texts)
    narrow, wide, _ = planned.units[:3]
    assert (narrow.config.noise, narrow.config.model.window) == (1.0, 7)
    assert narrow.config.model.name == "3"
    assert wide.config.model.width == 12
    assert len(planned.warnings) == 1 and "arm 'wide' sets model.width" in planned.warnings[0]


def test_an_override_that_reaches_nothing_is_an_error(experiment, work):
    with pytest.raises(ConfigError, match="every selected arm sets model.width itself: wide"):
        runner.plan(experiment, "cpu", work, arms=["wide"], overrides=["model.width=6"])


def test_an_override_must_change_a_selected_arm(experiment, work):
    """Not only the arm that it starts from, which nobody asked for."""
    with pytest.raises(ConfigError, match="^steps=4: every selected arm sets steps itself: tuned"):
        runner.plan(experiment, "cpu", work, arms=["tuned"], overrides=["steps=4"])


def test_two_runs_in_one_folder(experiment, work):
    """The second names the first; when that is killed, nothing of it remains in the way."""
    held = work / "wide/seed0"
    held.mkdir(parents=True)
    code = "import sys, time, pathlib\nfrom research.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, held], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    apart = runner.plan(experiment, "cpu", work, arms=["narrow"], seeds=[0])
    assert execute(apart) == {}  # of another folder
    planned = runner.plan(experiment, "cpu", work, arms=["wide"], seeds=[0])
    who = f"process {holder.pid} on {socket.gethostname()} since 20.* runs in it: wait for it, or"
    with pytest.raises(ConfigError, match=f"^workdir='{held}': {who}"):
        execute(planned)
    assert not (held / "unit.json").exists()
    holder.kill()
    holder.wait()
    assert execute(planned) == {} and not (held / "lock").exists()


def test_a_lock_is_of_the_process_and_survives_what_another_removed(work, monkeypatch):
    with lock.locked(work), lock.locked(work / "."):
        assert (work / "lock").exists()
    assert not (work / "lock").exists()
    with pytest.raises(KeyError), lock.locked(work):
        raise KeyError
    # the file is removed between its opening and its locking, by a process that ends
    taken, flock = [], fcntl.flock

    def removed_once(descriptor, operation):
        flock(descriptor, operation)
        if not taken:
            (work / "lock").unlink()
        taken.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with lock.locked(work):
        assert len(taken) == 2 and (work / "lock").exists()

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="No locks available: a second run"), lock.locked(work):
        pass


CHECKED = (
    SOURCE
    + """
from layers.config import ConfigError
def check(unit):
    if unit.arm == "tuned":
        raise ConfigError("steps=5: must be even")
"""
)


def test_mistakes_are_found_before_the_first_unit_starts(make_package, work):
    planned = runner.plan(load("branch/checked", make_package(checked=CHECKED)), "cpu", work)
    with pytest.raises(ConfigError, match="^arm 'tuned': steps=5: must be even$"):
        execute(planned)
    assert not work.exists()


@pytest.mark.parametrize("returned", [None, {}, {"loss": "low"}, {"loss": None}])
def test_a_result_must_be_numbers(experiment, work, monkeypatch, returned):
    monkeypatch.setattr(experiment.module, "run", lambda unit: returned)
    planned = runner.plan(experiment, "cpu", work, arms=["narrow"], seeds=[0])
    assert "TypeError: run returned" in execute(planned)["narrow", 0]


def test_non_finite_metrics_survive_the_file(experiment, work, monkeypatch):
    monkeypatch.setattr(experiment.module, "run", lambda unit: {"x": float("nan"), "y": [1, 2]})
    planned = runner.plan(experiment, "cpu", work, arms=["narrow"], seeds=[0])
    execute(planned)
    found = runner.results(planned)
    assert str(found.metric("narrow", "x")) == "[nan]"


def test_a_damaged_result_is_named(experiment, work):
    planned = runner.plan(experiment, "cpu", work, arms=["narrow"], seeds=[0])
    execute(planned)
    unit, result = (work / "narrow/seed0" / name for name in ("unit.json", "result.json"))
    whole = result.read_text()
    result.write_text(whole[:-9])
    with pytest.raises(ConfigError, match=f"^file='{result}': not JSON: .*; delete it to run"):
        runner.results(planned)
    result.write_text(whole)
    unit.write_text("{")
    with pytest.raises(ConfigError, match=f"^file='{unit}': not JSON: "):
        runner.plan(experiment, "cpu", work)


@pytest.mark.parametrize("terminal", [True, False])
def test_after_its_last_step_a_unit_evaluates(terminal):
    screen = io.StringIO()
    progress = Progress(Console(file=screen, force_terminal=terminal, width=140))
    with progress.over(1):
        progress.start("narrow", 0, resumed=False)
        progress.step(2, 3, {"loss": 1.25})
        if terminal:
            progress._bars.refresh()
        assert "evaluates" not in screen.getvalue()
        screen.seek(0)
        screen.truncate()
        progress.step(3, 3, {"loss": 1.25})
        if terminal:
            progress._bars.refresh()
        shown = screen.getvalue()
        assert "loss 1.250 · now evaluates and measures" in shown and "0:00:00" not in shown


def test_terminal_display_shows_the_unit():
    screen = io.StringIO()
    progress = Progress(Console(file=screen, force_terminal=True, width=140))
    with progress.over(2):
        progress.start("narrow", 0, resumed=False)
        progress.step(1, 3, {"loss": 1.25, "tokens_per_second": 1000.0})
        progress._bars.refresh()
        progress.finish("narrow", 0, 1.0, "")
    shown = screen.getvalue()
    assert "unit 1 of 2: narrow, seed 0" in shown
    assert "loss 1.250 · 1,000 tokens/s" in shown and "done in 1.0 s" in shown
