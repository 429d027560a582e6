"""A run that is killed again and again, also in the middle of a save, ends as one left alone.

``make soak`` kills it 50 times; the slow tests 3 times.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import environment
from tests.research.training.test_resume import assert_same

# Moments are counted in steps and saves, so that a busy machine comes as far as an idle one.
SCRIPT = """
import dataclasses, sys, time
sys.path.insert(0, {here!r})
from test_resume import DATA, MODEL, TRAINING
from research.training import train

workdir, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
training = dataclasses.replace(TRAINING, steps=steps, checkpoint_every=5, eval_every=20)

def progress(step, steps, metrics):
    print(step, flush=True)
    time.sleep(pause)

train(MODEL, DATA, training, workdir=workdir, progress=progress)
print("finished", flush=True)
"""


def saved(workdir):
    """The steps of the checkpoints that are whole, and the names of what is being written."""
    try:
        names = os.listdir(workdir / "checkpoints")
    except FileNotFoundError:
        names = []
    return [int(n) for n in names if n.isdigit()], [n for n in names if n.endswith("-tmp")]


def wait_for_saves(process, workdir, since, count):
    """Until the ``count``-th save that began after ``since`` is under way."""
    begun = set()
    while process.poll() is None and len(begun) < count:
        for name in saved(workdir)[1]:
            with contextlib.suppress(FileNotFoundError):  # it has just been finished
                if os.stat(workdir / "checkpoints" / name).st_mtime_ns >= since:
                    begun.add(name)
        time.sleep(0.0005)


def assert_every_second_is_charged(workdir, at_least_lost):
    """Also those between a kill and the next start: a second at least, to import JAX."""
    elapsed = time.time() - json.loads((workdir / "clock.json").read_text())["began"]
    spent = json.loads((workdir / "timing.jsonl").read_text().splitlines()[-1])
    parts = [value for name, value in spent.items() if name.startswith("seconds_")]
    assert elapsed - 60 < sum(parts) < elapsed
    assert spent["goodput"] * sum(parts) == pytest.approx(spent["seconds_step"])
    assert spent["seconds_lost"] > at_least_lost


@pytest.mark.parametrize(
    "kills, steps",
    [
        pytest.param(3, 40, marks=pytest.mark.slow),
        pytest.param(50, 800, marks=pytest.mark.soak),
    ],
)
def test_killed_at_any_moment(tmp_path, kills, steps):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(__file__).rpartition("/")[0]))
    workdir, alone = tmp_path / "killed", tmp_path / "alone"
    variables = environment(1) | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir, pause):
        return subprocess.Popen(
            [sys.executable, script, workdir, str(steps), str(pause)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        output, error = process.communicate(timeout=300)
        assert output.endswith("finished\n"), error[-2000:]
        return int(output.split()[0])

    finish(start(alone, 0.0))
    moments = random.Random(0)
    in_a_save = 0
    for number in range(kills):
        newest = max(saved(workdir)[0], default=0)
        began = time.time_ns()
        process = start(workdir, 0.02)
        first = process.stdout.readline()
        assert first == f"{newest + 1}\n", first + process.stderr.read()[-2000:]
        if number % 2:
            for _ in range(moments.randrange(20)):
                process.stdout.readline()
        else:
            wait_for_saves(process, workdir, began, moments.choice((1, 2, 3)))
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run is too short for so many kills"
        process.communicate()
        whole, rest = saved(workdir)
        assert max(whole, default=0) >= newest
        in_a_save += bool(rest)
    assert in_a_save >= kills / 4
    assert finish(start(workdir, 0.0)) == max(whole, default=0) + 1
    assert_same(workdir, alone)
    assert_every_second_is_charged(workdir, at_least_lost=kills)
    assert [sorted(found) for found in saved(workdir)] == [sorted(f) for f in saved(alone)]
