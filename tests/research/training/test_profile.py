"""A trace holds the steps that were asked for, and changes no number."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import warnings

import jax
import pytest

from layers.config import ConfigError
from research.training import train
from research.training.goodput import Clock
from research.training.profile import Trace
from tests.research.training.test_resume import DATA, MODEL, TRAINING, quiet

MODEL = dataclasses.replace(MODEL, num_layers=1)
PLAN = dataclasses.replace(TRAINING, steps=8, checkpoint_every=4, eval_every=4, log_every=1)


def run(workdir, **options):
    return train(MODEL, DATA, PLAN, workdir=workdir, **{"progress": quiet, **options})


def traced(folder):
    """The numbers of the steps in the one trace in ``folder``, of both its files, and its events'
    names."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = [
        (event.name, dict(event.stats).get("step_num"))
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
    ]
    with gzip.open(path.parent / "perfetto_trace.json.gz") as file:
        shown = json.load(file)["traceEvents"]
    steps = [number for name, number in events if name == "train"]
    assert [int(e["args"]["step_num"]) for e in shown if e.get("name") == "train"] == steps
    return steps, [name for name, _ in events]


# Where the TPU's compiler has been loaded, as other tests do, JAX's profiler crashes the process.
ALONE = "TRACES_IN_A_PROCESS_OF_THEIR_OWN"
traces = pytest.mark.skipif(ALONE not in os.environ, reason="run by test_traces")


def test_traces():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-k",
            "not test_traces",
            __file__,
        ],
        env={**os.environ, ALONE: "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    run(workdir)
    return workdir


@traces
def test_the_steps_asked_for_and_no_others(plain, tmp_path):
    run(tmp_path, profile=(3, 6))
    steps, names = traced(tmp_path / "profile")
    assert steps == [3, 4, 5]
    # and what the device did in them
    assert any(name.startswith("dot") for name in names)
    for name in ("metrics.jsonl", "config.json"):
        assert (tmp_path / name).read_bytes() == (plain / name).read_bytes()
    assert not (plain / "profile").exists()


@traces
def test_from_the_first_step_to_the_last(tmp_path):
    run(tmp_path, profile=(1, 9))
    assert traced(tmp_path / "profile")[0] == list(range(1, 9))


@pytest.mark.parametrize("profile", [(6, 3), (3, 3), (0, 2), (-1, 2), (8, 10), (20, 30)])
def test_steps_that_there_are_not_are_refused(tmp_path, profile):
    name = f"{profile[0]}:{profile[1]}"
    with pytest.raises(ConfigError, match=f"^profile='{name}': .* 1 ≤ FIRST < END ≤ 9$"):
        run(tmp_path / "run", profile=profile)
    assert not (tmp_path / "run").exists()


def test_without_a_workdir_there_is_nowhere_to_write():
    with pytest.raises(ConfigError, match="^profile='1:2': requires a workdir"):
        run(None, profile=(1, 2))


@traces
def test_a_run_that_stops_in_the_middle_of_it(tmp_path):
    """What was traced is written; started again, the run traces what is left, and says so."""

    def fail(step, steps, metrics):
        if step == 5:
            raise OSError

    with pytest.raises(OSError):
        run(tmp_path, profile=(2, 7), progress=fail)
    assert traced(tmp_path / "profile")[0] == [2, 3, 4, 5]
    (tmp_path / "profile").rename(tmp_path / "before")
    with pytest.warns(UserWarning, match="^profile=2:7: .* from step 4: only 5:7 is traced"):
        run(tmp_path, profile=(2, 7))
    assert traced(tmp_path / "profile")[0] == [5, 6]


def test_steps_that_are_behind(tmp_path):
    with pytest.warns(UserWarning, match="^profile=2:5: the run resumes from step 4: nothing is"):
        Trace((2, 5), 8, tmp_path, Clock()).resume(4)
    with warnings.catch_warnings(action="error"):
        Trace((2, 5), 8, tmp_path, Clock()).resume(1)
        Trace(None, 8, tmp_path, Clock()).resume(4)
