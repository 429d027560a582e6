"""Every second of a run is charged to one part, whatever is killed; on a clock that tests move."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from research.training import goodput, loop, run, source, train
from research.training.checkpoint import Checkpoints
from research.training.goodput import Clock
from tests.research.training.test_resume import DATA, MODEL, TRAINING, quiet

MODEL = dataclasses.replace(MODEL, num_layers=1)
PLAN = dataclasses.replace(TRAINING, steps=8, checkpoint_every=3, eval_every=4, log_every=1)


class Hands:
    """A clock that stands still unless it is moved."""

    now = 1e9
    finish = staticmethod(jax.block_until_ready)  # what a step does at its end

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


class Killed(Exception):
    pass


def kill_at(last):
    def progress(step, steps, metrics):
        if step == last:
            raise Killed

    return progress


@pytest.fixture
def hands(monkeypatch):
    """Seconds: 5 to restore, 100 to compile, 10 a step, 1 a batch, 3 an evaluation, 2 a save."""
    hands = Hands()
    monkeypatch.setattr(goodput, "time", hands)

    def taking(seconds, function):
        def slow(*arguments, **options):
            hands.now += seconds
            return function(*arguments, **options)

        return slow

    class Slow:
        def __init__(self, dataset):
            self.iterator = iter(dataset)
            self.get_state, self.set_state = self.iterator.get_state, self.iterator.set_state

        def __iter__(self):
            return self

        def __next__(self):
            hands.now += 1
            return next(self.iterator)

    def make_step(*arguments, **options):
        step, calls = make(*arguments, **options), []

        def slow(state, batch, frozen):
            hands.now += 10 if calls else 100
            calls.append(None)
            return hands.finish(step(state, batch, frozen))

        return slow

    def slow_dataset(*arguments, **options):
        made = make_dataset(*arguments, **options)
        return made if options.get("split") == "validation" else Slow(made)

    make, make_dataset = loop.make_step, source.make_dataset
    monkeypatch.setattr(loop, "make_step", make_step)
    monkeypatch.setattr(source, "make_dataset", slow_dataset)
    monkeypatch.setattr(run, "evaluate", taking(3, run.evaluate))
    monkeypatch.setattr(Checkpoints, "save", taking(2, Checkpoints.save))
    monkeypatch.setattr(Checkpoints, "restore", taking(5, Checkpoints.restore))
    return hands


def rows(workdir):
    return [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]


def parts(row):
    prefix = "seconds_"
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}


def test_an_uninterrupted_run(hands, tmp_path):
    train(MODEL, DATA, PLAN, workdir=tmp_path, progress=quiet)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 9))
    assert parts(found[0]) == dict(start=5, compile=100, data=1)
    assert found[0]["goodput"] == 0
    last = dict(step=70, start=5, compile=100, data=8, evaluate=6, save=6)
    assert parts(found[-1]) == last
    assert found[-1]["goodput"] == 70 / sum(last.values())


def test_steps_that_are_done_again_and_the_time_between_are_lost(hands, tmp_path):
    """Killed after step 5, the run goes on 1000 seconds later from the checkpoint of step 3."""
    began = hands.now
    with pytest.raises(Killed):
        train(MODEL, DATA, PLAN, workdir=tmp_path, progress=kill_at(5))
    # saving, steps 4 and 5 with their batches, and the evaluation after step 4
    lost = 2 + 2 * (10 + 1) + 3
    assert hands.now - began == (5 + 100 + 3 * 1 + 2 * 10) + lost
    hands.now += 1000
    train(MODEL, DATA, PLAN, workdir=tmp_path, progress=quiet)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 9))
    # steps 2 and 3 of the first start, 5 to 8 of the second
    last = dict(step=60, start=10, compile=200, data=8, evaluate=6, save=4, lost=lost + 1000)
    assert parts(found[-1]) == last
    assert sum(last.values()) == hands.now - began
    assert found[-1]["goodput"] == 60 / (hands.now - began)


def test_a_run_killed_before_its_first_checkpoint_lost_all_of_it(hands, tmp_path):
    for _ in range(2):
        with pytest.raises(Killed):
            train(MODEL, DATA, PLAN, workdir=tmp_path, progress=kill_at(2))
        hands.now += 50
    lost = 5 + 100 + 2 * 1 + 10 + 50
    (row,) = rows(tmp_path)  # a step's is written when it is all done
    assert parts(row) == dict(start=5, compile=100, data=1, lost=lost)


def test_a_batch_that_comes_while_the_step_before_runs_is_not_waited_for(
    hands, tmp_path, monkeypatch
):
    class Running:
        """A number that the device has not computed yet."""

        def __init__(self, value):
            self.value = value

        def is_ready(self):
            return False

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.value, dtype)

    def begun(result):
        return result[0], {name: Running(value) for name, value in result[1].items()}

    monkeypatch.setattr(hands, "finish", begun)
    train(MODEL, DATA, PLAN, workdir=tmp_path, progress=quiet)
    # The loop waits for steps 1 (which compiles), 3, 4 and 6 (evaluated or saved) on its own
    # account: nothing runs while the batches after them, and the first, are fetched.
    assert parts(rows(tmp_path)[-1]) == dict(
        step=70 + 3, start=5, compile=100, data=5, evaluate=6, save=6
    )


def test_a_clock_without_its_file_and_one_that_is_behind(hands, tmp_path):
    held = {"step": 30.0, "save": 10.0}
    Clock().resume(held, tmp_path)  # a run from before there were clocks
    assert json.loads((tmp_path / "clock.json").read_text()) == {"began": hands.now - 40}
    hands.now -= 7
    behind = Clock()
    behind.resume(held, tmp_path)
    assert behind.seconds()["lost"] == 0
    assert behind.row() == dict(goodput=0.75, seconds_step=30, seconds_save=10)


def test_parts_within_parts(hands):
    clock = Clock()
    with clock.during("step"):
        hands.now += 1
        with pytest.raises(Killed), clock.during("save"):
            hands.now += 2
            raise Killed
        hands.now += 4
        with clock.during("data", unless=lambda: True):
            hands.now += 8
    hands.now += 16
    seconds = clock.seconds()
    assert {k: v for k, v in seconds.items() if v} == dict(step=13, save=2, start=16)
