"""A run that is killed, interrupted or damaged ends as one that was left alone, bit for bit."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

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


def assert_same(workdir, uninterrupted, model=None):
    # a run whose batches come from a source of its own has no data.json
    there = {
        name for w in (workdir, uninterrupted) for name in ("data.json",) if (w / name).exists()
    }
    for name in ("metrics.jsonl", "config.json", *there):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    leaves = [jax.tree.leaves(load_model(w, model=model)) for w in (workdir, uninterrupted)]
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


def finish(tmp_path, workdir):
    out, error = start(tmp_path, workdir).communicate(timeout=600)
    assert out.endswith("finished\n"), error[-2000:]


@pytest.fixture(scope="module")
def uninterrupted_process(tmp_path_factory):
    """The reference for processes: other tests' compiler settings are in force in this one."""
    folder = tmp_path_factory.mktemp("uninterrupted_process")
    finish(folder, folder / "run")
    return folder / "run"


def wait_for_step(process, step):
    for line in process.stdout:
        if line.strip() == str(step):
            return
    raise AssertionError(process.stderr.read()[-2000:])


def test_another_seed_compiles_nothing_again(uninterrupted, caplog):
    """The seed is an argument of the initialiser, so that units of all seeds share a program."""
    with jax.log_compiles():
        train(MODEL, DATA, TRAINING, seed=1, progress=quiet)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert not compiled, compiled


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_process_saves(uninterrupted_process, tmp_path, number):
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
    finish(tmp_path, workdir)
    assert_same(workdir, uninterrupted_process)


@pytest.mark.parametrize(
    "number, raised, at",
    [(15, Preempted, 1), (15, Preempted, 7), (15, Preempted, 23), (2, KeyboardInterrupt, 7)],
)
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


def truncate(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_arrays(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_state(checkpoint):
    shutil.rmtree(checkpoint / "state")


def lose_the_position(checkpoint):
    shutil.rmtree(checkpoint / "position")


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate, truncate_arrays, lose_the_state, lose_the_position, empty]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(uninterrupted, copy, damage):
    damage(copy / "checkpoints" / "24")
    steps = []
    with pytest.warns(UserWarning, match="checkpoint checkpoints/24 cannot be read") as warned:
        run(copy, progress=lambda step, total, metrics: steps.append(step))
    message = next(str(w.message) for w in warned if "cannot be read" in str(w.message))
    assert "\n" not in message
    assert steps == [21, 22, 23, 24]
    assert (copy / "unreadable" / "24").is_dir()
    assert_same(copy, uninterrupted)


def test_no_readable_checkpoint_is_an_error_and_not_a_fresh_start(copy):
    for checkpoint in (copy / "checkpoints").iterdir():
        truncate(checkpoint)
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="none of its ch") as caught:
        run(copy)
    assert "\n" not in str(caught.value)
    # nor is it one the second time
    with pytest.raises(ConfigError):
        run(copy)


def test_a_workdir_of_another_run_is_refused(copy):
    for change, field in (
        (dict(model=dataclasses.replace(MODEL, width=64)), "model.width=64"),
        (dict(data=dataclasses.replace(DATA, batch_size=4)), "data.batch_size=4"),
        (dict(training=dataclasses.replace(TRAINING, steps=30)), "training.steps=30"),
        (dict(seed=1), "seed=1"),
    ):
        told = {"model": MODEL, "data": DATA, "training": TRAINING, **change}
        with pytest.raises(ConfigError, match=f"^{field}: workdir .* was begun with") as caught:
            train(**told, workdir=copy, progress=quiet)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(copy):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"width": 32', '"width": 64'))
    with pytest.raises(ConfigError, match="has shape .*, the run requires") as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json"):
        load_model(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^workdir=.*cannot be written"):
        run(tmp_path / "file" / "below")


def test_a_run_that_diverges_says_where_and_keeps_its_last_checkpoint(tmp_path):
    training = TrainingConfig(
        steps=24,
        eval_batches=0,
        checkpoint_every=1,
        optimizer=OptimizerConfig(learning_rate=1e38, clip_norm=None, schedule="constant"),
    )
    with pytest.raises(DivergenceError, match=r"^step \d+: (loss|gradient_norm)=") as caught:
        train(MODEL, DATA, training, workdir=tmp_path, progress=quiet)
    message = str(caught.value)
    assert "\n" not in message
    step = int(message.split()[1].rstrip(":"))
    batch = np.load(tmp_path / f"diverged-{step}.npz")
    assert f"its batch is in diverged-{step}.npz" in message
    assert batch["tokens"].shape == (8, 32) and batch["tokens"].dtype == np.int32
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == step - 1
    load_model(tmp_path)


def test_nan_in_the_first_weights(tmp_path):
    def plant(model):
        return jax.tree.map(lambda a: a * np.nan, model)

    with pytest.raises(DivergenceError, match="^step 1: loss=nan, gradient_norm=nan"):
        run(tmp_path, init=plant)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_held_out_loss_that_is_no_number_stops_before_the_save(tmp_path, monkeypatch):
    seen = []

    def measured(*arguments, **options):
        seen.append(None)
        return {"loss": 1.0 if len(seen) == 1 else float("nan")}

    monkeypatch.setattr("research.training.run.evaluate", measured)
    training = dataclasses.replace(TRAINING, eval_every=4)
    with pytest.raises(DivergenceError, match="^step 8: eval_loss=nan"):
        train(MODEL, DATA, training, workdir=tmp_path, progress=quiet)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_signal_during_evaluation_loses_no_step(tmp_path, monkeypatch):
    from research.training import evaluate

    def interrupted(*arguments, **options):
        found = evaluate(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return found

    training = dataclasses.replace(TRAINING, eval_every=5, checkpoint_every=100)
    monkeypatch.setattr("research.training.run.evaluate", interrupted)
    with pytest.raises(Preempted):
        train(MODEL, DATA, training, workdir=tmp_path, progress=quiet)
    monkeypatch.setattr("research.training.run.evaluate", evaluate)
    steps = []
    train(MODEL, DATA, training, workdir=tmp_path, progress=lambda n, total, m: steps.append(n))
    assert steps == list(range(6 + 1, 25))
