"""A source of one's own: it sees the model, resumes bit for bit, and says what it has not."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.config import ConfigError
from research.training import DataError, Preempted, TrainingConfig, train
from tests.research.training.test_resume import DATA, MODEL, assert_same, quiet

STEPS, ROWS, LENGTH = 8, 4, 8
TRAINING = TrainingConfig(steps=STEPS, checkpoint_every=3, log_every=1, eval_batches=0)
continued = jax.jit(lambda model, tokens: jnp.argmax(model(tokens).logits_btv, axis=-1))


class OnPolicy:
    """Rows that the model being trained continues: a random prompt, and its likeliest tokens."""

    name = "toy"
    batch_size = ROWS

    def __init__(self, ends: int | None = None):
        self.random = np.random.default_rng(0)
        self.ends = ends
        self.given: dict[int, np.ndarray] = {}

    def next(self, step, model):
        if step == self.ends:
            raise StopIteration
        prompts = self.random.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
        targets = np.asarray(continued(model, prompts))
        # rewarded: tokens that are even
        weights = 1.0 + (targets % 2 == 0)
        self.given[step] = targets
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
        return dict(
            tokens=prompts, targets=targets, positions=positions,
            segment_ids=np.ones((ROWS, LENGTH), np.int32), weights=weights.astype(np.float32),
        )  # fmt: skip

    def get_state(self):
        return self.random.bit_generator.state

    def set_state(self, state):
        self.random.bit_generator.state = state


def go(source, workdir, **options):
    return train(
        MODEL, None, TRAINING, source=source, workdir=workdir, **{"progress": quiet, **options}
    )


def test_an_on_policy_source_resumes_bit_for_bit(tmp_path):
    whole = OnPolicy()
    go(whole, tmp_path / "whole")
    assert sorted(whole.given) == list(range(1, STEPS + 1))

    def stop(step, steps, metrics):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    first, second = OnPolicy(), OnPolicy()
    with pytest.raises(Preempted):
        go(first, tmp_path / "parted", progress=stop)
    go(second, tmp_path / "parted")
    assert (sorted(first.given), sorted(second.given)) == ([1, 2, 3, 4], [5, 6, 7, 8])
    for step, targets in (first.given | second.given).items():
        np.testing.assert_array_equal(targets, whole.given[step], err_msg=str(step))
    assert_same(tmp_path / "whole", tmp_path / "parted")
    # and the batches are of the policy: another one's are others
    other = OnPolicy()
    go(other, tmp_path / "other", seed=1)
    assert np.any(other.given[1] != whole.given[1])


def test_a_source_that_ends_is_named(tmp_path):
    with pytest.raises(DataError, match="^toy: ends before step 3$"):
        go(OnPolicy(ends=3), tmp_path)


@pytest.mark.parametrize(
    "data, source, training, message",
    [
        (None, None, {}, "source=None: exactly one of data and source is required"),
        (DATA, OnPolicy(), {}, "source='given': exactly one of data and source is required"),
        (None, OnPolicy(), dict(eval_batches=1), "eval_batches=1: must be 0: toy has no held-out"),
        (
            None,
            OnPolicy(),
            dict(eval_batches=0, gradient_accumulation=3),
            "must divide the 4 rows of a device",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, source, training, message):
    with pytest.raises(ConfigError, match=message):
        train(MODEL, data, TrainingConfig(steps=1, **training), source=source)
