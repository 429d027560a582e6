"""Two processes of four devices each train as one process, read each other's checkpoints, and end
together when one of them is lost."""

import json
import signal
import sys
import time

import jax
import pytest

from research.parallel.processes import alone_in
from tests.conftest import finish_together, start_together
from tests.research.parallel.test_training import MODEL

LOST = 3
# Noticed at once or after the heartbeat's 10 s (tests/conftest.py), on a busy machine a bit later.
BOUND = 30

RUN = (
    MODEL
    + """
import json, sys, time

initialize()
assert jax.device_count() == 8
training = dataclasses.replace(TRAINING, steps=8, checkpoint_every=2, log_every=1, eval_batches=1)


def told(step, steps, metrics):
    print(step, flush=True)
    time.sleep(0.1)


mesh = MeshConfig(**json.loads(sys.argv[2]))
train(MODEL, DATA, training, mesh=mesh, workdir=sys.argv[1], progress=told)
print("passed", jax.process_index())
"""
)
MESH = '{"data": 2, "fsdp": 2, "tensor": 2}'


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(workdir, processes)``: begin `RUN` there."""
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(RUN)

    def start(workdir, processes, mesh=MESH):
        return start_together([sys.executable, script, workdir, mesh], processes)

    return start


def metrics_of(started, workdir) -> str:
    for index, (code, output, error) in enumerate(finish_together(started)):
        assert code == 0 and output.endswith(f"passed {index}\n"), error[-4000:]
    return (workdir / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start):
    """A folder with the workdirs ``one`` and ``two``, of as many processes, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    for name, processes in (("one", 1), ("two", 2)):
        metrics_of(start(folder / name, processes), folder / name)
    return folder


def test_two_processes_train_as_one(finished):
    rows = [
        [json.loads(line) for line in (finished / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == 9
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_and_both_go_on(
    finished, start, tmp_path, run_script, victim
):
    """Process 0 holds the coordination service, and takes it along."""
    workdir = tmp_path / "killed"
    started = start(workdir, 2)
    for line in started[victim].stdout:
        if line == "5\n":
            break
    started[victim].kill()
    killed = time.monotonic()
    other = started[1 - victim]
    other.wait(BOUND)
    took = time.monotonic() - killed
    ended = finish_together(started)
    assert [ended[victim][0], ended[1 - victim][0]] == [-signal.SIGKILL, LOST]
    assert took < BOUND
    last = ended[1 - victim][2].splitlines()[-1]
    assert last.startswith(f"process {1 - victim} of 2: ") and "another process was lost" in last
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) < 8
    again = metrics_of(start(workdir, 2), workdir)
    assert again == (finished / "two" / "metrics.jsonl").read_text(), "resumed, it differs"
    # what two processes of four devices saved, one process with one device reads
    same = f"""
import numpy as np, jax
from research.training import load_model
workdirs = ["{finished}/one", "{finished}/two", "{workdir}"]
leaves = [jax.tree.leaves(load_model(workdir)) for workdir in workdirs]
for a, b, c in zip(*leaves, strict=True):
    assert len(a.devices()) == 1
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(b, c)
"""
    run_script(same, devices=1)


# Without training: joins, and then one of the two does what a run must survive.
SCRIPT = """
import os, sys, time
import jax, numpy as np
from research.parallel import initialize, processes
from jax.experimental import multihost_utils

initialize()
me, what = jax.process_index(), sys.argv[1]
print("joined", flush=True)


def stay():
    with processes.fate_shared():
        for _ in range(1000):
            multihost_utils.process_allgather(np.ones(1))
            time.sleep(0.05)


if what == "alone":  # fails where the other needs it
    if me == 1:
        raise OSError("disk gone")
    stay()
elif what == "alone in a unit":
    if me == 1:
        processes.first_failure("OSError: disk gone")
    stay()
elif what == "alike":
    raise ValueError(f"wrong in {me}")
elif what == "told":
    assert processes.first_failure("lost" if me else "") == "lost"
    assert processes.first_failure("") == ""
    assert processes.same_everywhere(np.arange(3))
    assert not processes.same_everywhere(np.arange(3) + me)
    processes.barrier()
elif what == "late":  # a process that is slow is not lost
    if me == 1:
        time.sleep(15)
    assert processes.first_failure("") == ""
"""


def end(tmp_path, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    began = time.monotonic()
    ended = finish_together(start_together([sys.executable, script, what]), timeout=60)
    assert time.monotonic() - began < 60
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("what", ["alone", "alone in a unit"])
def test_a_process_that_fails_alone_does_not_keep_the_other(tmp_path, what):
    (code, _, error), (other_code, _, other_error) = end(tmp_path, what)
    assert (code, other_code) == (LOST, 1), error + other_error
    assert error.splitlines()[-1].startswith("process 0 of 2: ")
    assert "another process was lost" in error.splitlines()[-1]
    assert "OSError: disk gone" in other_error


def test_processes_that_fail_alike_all_say_so(tmp_path):
    for index, (code, _, error) in enumerate(end(tmp_path, "alike")):
        assert code == 1 and error.splitlines()[-1] == f"ValueError: wrong in {index}"


@pytest.mark.parametrize("what", ["told", pytest.param("late", marks=pytest.mark.slow)])
def test_processes_agree(tmp_path, what):
    for code, _, error in end(tmp_path, what):
        assert code == 0, error


def test_only_the_first_process_locks_however_they_were_connected(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        with alone_in(tmp_path):
            assert (tmp_path / "lock").exists() == (index == 0)


def test_a_mesh_whose_rows_do_not_divide_over_processes_is_refused(tmp_path, start):
    """A process brings whole rows, so that ``sequence`` cannot reach across processes."""
    for code, _, error in finish_together(start(tmp_path, 2, '{"data": 1, "sequence": 8}')):
        assert code == 1
        assert "ConfigError: mesh.stage×data×fsdp×expert=1: must be" in error.splitlines()[-1]
