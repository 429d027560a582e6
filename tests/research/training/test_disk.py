"""A disk that takes no more ends a run with one line; with room again the run goes on."""

import errno
import os
import re
import subprocess
import sys

import pytest

from research.ablation import load, runner
from research.cli import main
from research.training import WriteError, load_model
from research.training.disk import writing
from research.training.metrics import Metrics
from tests.conftest import environment
from tests.research.training.test_resume import SCRIPT, assert_same, finish, run

HERE = str(__file__).rpartition("/")[0]


@pytest.mark.parametrize("at", [6, pytest.param(22, marks=pytest.mark.slow)])
def test_a_checkpoint_directory_that_is_lost_in_a_run(tmp_path, at):
    """A save is written in the background: it is told at the next one, or at the end."""
    place, gone = tmp_path / "run/checkpoints", tmp_path / "gone"

    def lose(step, steps, metrics):
        if step == at:
            place.rename(gone)
            place.write_text("")

    with pytest.raises(WriteError, match="cannot be written: .*; when it can, the") as caught:
        run(tmp_path / "run", progress=lose)
    assert str(caught.value).startswith(f"{place}: ") and "\n" not in str(caught.value)
    place.unlink()
    gone.rename(place)
    steps = []
    run(tmp_path / "run", progress=lambda step, total, metrics: steps.append(step))
    # the save before may have been under way when its directory went
    assert steps[0] in (at - at % 4 - 3, at - at % 4 + 1)
    run(tmp_path / "uninterrupted")
    assert_same(tmp_path / "run", tmp_path / "uninterrupted")


WRITING = 'Error writing "model/a" in OCDBT database: Error reading ByteRange'


@pytest.mark.parametrize(
    "text, reason",
    [
        (f"NOT_FOUND: {WRITING}", "not found"),
        (f'NOT_FOUND: Error opening "zarr" driver: {WRITING}', "not found"),
        ("Checkpoint directory does not exist: /tmp/run.", "No such file or directory"),
    ],
)
def test_what_is_told_without_a_code(tmp_path, text, reason):
    with pytest.raises(WriteError, match=f"cannot be written: {reason}; when it can"):
        with writing(tmp_path):
            raise ValueError(text)
    with pytest.raises(ValueError, match="^another$"):
        with writing(tmp_path):
            raise ValueError("another")


# Nothing but checkpoints is written after the start, and at the last step nothing can be.
FULL = """
import dataclasses, resource, signal, sys
sys.path.insert(0, {here!r})
from test_resume import DATA, MODEL, TRAINING
from research.training import WriteError, train

def progress(step, steps, metrics):
    if step == steps:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

training = dataclasses.replace(TRAINING, log_every=100, eval_batches=0)
try:
    train(MODEL, DATA, training, workdir={workdir!r}, progress=progress)
except WriteError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_error_of_the_last_save_is_told(tmp_path, run_script):
    """Nothing comes after it that could tell; and what it left is taken for no checkpoint."""
    told = run_script(FULL.format(here=HERE, workdir=str(tmp_path / "run")), devices=1)
    assert told.count("\n") == 1
    assert told.startswith(f"{tmp_path}/run/checkpoints: cannot be written: File too large; when")
    whole = {p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()}
    assert "24" not in whole and whole & {"16", "20"}
    load_model(tmp_path / "run")


def test_records_that_cannot_be_written(tmp_path):
    records = Metrics(tmp_path, 0)
    records.write("metrics", 1, {"loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_text()
    file, records._files["metrics"] = records._files["metrics"], open("/dev/full", "w")
    with pytest.raises(WriteError, match=f"^{tmp_path}: cannot be written: No space left on dev"):
        records.write("metrics", 2, {"loss": 2.0})
    records.close()
    file.write('{"step": 2, "lo')  # what fitted
    file.close()
    temporary = tmp_path / f".metrics.{os.getpid()}.jsonl"
    temporary.symlink_to("/dev/full")  # still full
    with pytest.raises(WriteError, match="No space left on device"):
        Metrics(tmp_path, 2)
    assert not temporary.is_symlink()
    Metrics(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_board_that_cannot_be_written_does_not_hang(tmp_path):
    """Its file alone is full: more points than any buffer or queue holds end in an error."""
    records = Metrics(tmp_path, 0)
    records._events._events._py_recordio_writer._writer = open("/dev/full", "wb")
    with pytest.raises(WriteError, match="No space left on device"):
        for step in range(10_000):
            records.write("metrics", step, {"loss": 2.0})
    records.close()


def test_what_is_not_the_system_is_no_write_error(tmp_path):
    with pytest.raises(ValueError, match="^wrong$"), writing(tmp_path):
        raise ValueError("wrong")
    told = "RESOURCE_EXHAUSTED: Error writing [os_error_code='28']"
    with pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)), writing(tmp_path):
        raise ValueError(told)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_one_line_and_no_traceback(tmp_path):
    """A disk of 4 MB of its own; Orbax would tell of it in hundreds of lines."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        script = tmp_path / "full.py"
        fill_up = f"""
    if step == 6:
        with open({str(disk / "ballast")!r}, "wb", buffering=0) as ballast:
            size = 65536
            while size:
                try:
                    ballast.write(b"x" * size)
                except OSError:
                    size //= 2
"""
        source = SCRIPT.format(here=HERE, workdir=str(disk / "run"))
        script.write_text(source.replace("    time.sleep(0.05)\n", fill_up))
        done = subprocess.run(
            [sys.executable, script], env=environment(1), capture_output=True, text=True
        )
        error = done.stderr.splitlines()
        assert done.returncode == 1 and done.stdout.splitlines()[-1] in ("6", "7", "8")
        assert error[-1].startswith("research.training.disk.WriteError: "), done.stderr[-4000:]
        assert f"{disk}/run" in error[-1]
        assert re.search("No space left on device|resource exhausted", error[-1])
        # Python's own traceback, of this call, is all there is besides
        assert [line for line in error if line and line[0] != " "] == [
            "Traceback (most recent call last):",
            error[-1],
        ]
        (disk / "ballast").unlink()
        finish(tmp_path, disk / "run")
        assert {p.name for p in (disk / "run/checkpoints").iterdir()} == {"20", "24"}
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_in_the_command_is_exit_2(make_package, tmp_path, capsys, monkeypatch):
    """It is no failure of the unit, after which the next one would fill the disk as well."""
    package, work = make_package(), tmp_path / "work"
    experiment = load("branch/wide", package)

    def full(unit):
        with writing(unit.workdir):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"{package}.branch.wide.run", full)
    assert main(["run", "branch/wide", f"--workdir={work}"], package=package) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"ablate: {work}/narrow/seed0: cannot be written" in error
    states = {runner.state(unit) for unit in runner.plan(experiment, "cpu", work).units}
    assert states == {"interrupted", "new"}
