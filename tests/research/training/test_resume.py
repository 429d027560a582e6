"""A run that is killed, interrupted or damaged ends as one that was left alone, bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.training import (
    DivergenceError,
    OptimizerConfig,
    Preempted,
    TrainingConfig,
    load_model,
    train,
)
from tests.conftest import environment

MODEL = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(64),
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=32,
    batch_size=8,
    synthetic=SyntheticConfig(task="copy", vocab_size=64, examples=100),
)
TRAINING = TrainingConfig(
    steps=24, eval_every=10, eval_batches=2, checkpoint_every=4, log_every=1, keep=2
)
# The same run in a process of its own, slowed down so that there is time to kill it.
SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from test_resume import DATA, MODEL, TRAINING
from research.training import train

def progress(step, steps, metrics):
    print(step, flush=True)
    time.sleep(0.05)

train(MODEL, DATA, TRAINING, workdir={workdir!r}, progress=progress)
print("finished", flush=True)
"""


def quiet(step, steps, metrics):
    """Shows nothing."""


def run(workdir, **options):
    return train(MODEL, DATA, TRAINING, workdir=workdir, **{"progress": quiet, **options})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(workdir)
    return workdir


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """A finished run, to damage."""
    return shutil.copytree(uninterrupted, tmp_path / "copy")


def assert_same(workdir, uninterrupted):
    for name in ("metrics.jsonl", "config.json", "data.json"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    leaves = [jax.tree.leaves(load_model(w)) for w in (workdir, uninterrupted)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


def start(tmp_path, workdir):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(__file__).rpartition("/")[0], workdir=str(workdir)))
    return subprocess.Popen(
        [sys.executable, script],
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, step):
    for line in process.stdout:
        if line.strip() == str(step):
            return
    raise AssertionError(process.stderr.read()[-2000:])


def test_kill_9_at_any_moment(uninterrupted, tmp_path):
    """Saves begin at steps 4, 8, …: the first kills are aimed at one, the others anywhere."""
    workdir = tmp_path / "run"
    random.seed(0)
    for step, delay in ((5, 0.0), (9, 0.01), (17, random.random() / 5)):
        process = start(tmp_path, workdir)
        wait_for_step(process, step)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    process = start(tmp_path, workdir)
    out, error = process.communicate(timeout=600)
    assert out.endswith("finished\n"), error[-2000:]
    assert_same(workdir, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_saves(uninterrupted, tmp_path, number):
    workdir = tmp_path / "run"
    process = start(tmp_path, workdir)
    wait_for_step(process, 6)
    process.send_signal(number)
    assert "finished" not in process.stdout.read()
    error = process.stderr.read()
    process.wait()
    assert 6 <= max(int(p.name) for p in (workdir / "checkpoints").iterdir()) < 24
    if number == signal.SIGTERM:
        assert process.returncode == 0 and "Traceback" not in error, error[-2000:]
    else:
        assert process.returncode != 0 and "KeyboardInterrupt" in error
    run(workdir)
    assert_same(workdir, uninterrupted)


@pytest.mark.parametrize("number, raised", [(15, Preempted), (2, KeyboardInterrupt)])
@pytest.mark.parametrize("at", [1, 3, 7, 23])
def test_a_signal_at_any_step_loses_none(uninterrupted, tmp_path, number, raised, at):
    def send(step, steps, metrics):
        if step == at:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(raised):
        run(tmp_path, progress=send)
    assert signal.getsignal(number) == before
    steps = []
    run(tmp_path, progress=lambda step, steps_, metrics: steps.append(step))
    assert steps == list(range(at + 1, 25))
    assert_same(tmp_path, uninterrupted)


def test_a_signal_during_the_last_step_finishes(uninterrupted, tmp_path):
    def send(step, steps, metrics):
        if step == steps:
            signal.raise_signal(signal.SIGTERM)

    run(tmp_path, progress=send)
    assert_same(tmp_path, uninterrupted)


def test_an_error_elsewhere_leaves_the_run_resumable(uninterrupted, tmp_path):
    def fail(step, steps, metrics):
        if step == 11:
            raise OSError("terminal gone")

    with pytest.raises(OSError, match="terminal gone"):
        run(tmp_path, progress=fail)
    run(tmp_path)
    assert_same(tmp_path, uninterrupted)


def test_a_finished_run_computes_nothing_again(copy):
    before = (copy / "metrics.jsonl").read_bytes()
    result = run(copy, progress=lambda *a: pytest.fail("a step was done"))
    assert (copy / "metrics.jsonl").read_bytes() == before
    rows = [json.loads(line) for line in before.splitlines()]
    final = {k: v for row in rows if row["step"] == 24 for k, v in row.items() if k != "step"}
    assert {k: result.metrics[k] for k in final} == final
