"""Which checkpoints stay: the newest, and the best; and which are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.config import ConfigError
from research.training.checkpoint import Checkpoints

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: None}  # step 5 was saved without an evaluation


@pytest.mark.parametrize("runs", [[[1, 2, 3, 4, 5]], [[1, 2], [3], [4, 5]]])
def test_the_newest_and_the_best_are_kept(tmp_path, runs):
    """Of all runs in the workdir: a resumed one knows what its predecessors found best."""
    for steps in runs:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
        for step in steps:
            state = {"w": jnp.full((3,), step, jnp.float32)}
            checkpoints.save(step, state, {"data": step}, LOSSES[step])
        checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 5]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state, position = checkpoints.restore(lambda position: {"w": jnp.zeros(3)})
    checkpoints.close()
    np.testing.assert_array_equal(state["w"], np.full(3, 5.0))
    assert position == {"data": 5}


def test_nothing_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.restore(lambda position: {"w": jnp.zeros(3)}) is None
    checkpoints.close()


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (dict(mu=jnp.zeros(3)), "optimizer/mu has dtype bfloat16, the run requires float32"),
        (dict(mu=jnp.zeros(4)), "optimizer/mu has shape (3,), the run requires (4,)"),
        (
            dict(mu=jnp.zeros(3, jnp.bfloat16), nu=jnp.zeros(3)),
            "has no optimizer/nu, which the run requires",
        ),
        (dict(), "has optimizer/mu, which the run does not use"),
    ],
)
def test_another_state_is_refused_in_one_line_and_its_model_can_be_read(tmp_path, moments, message):
    def restore(target, **options):
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
        try:
            return checkpoints.restore(lambda position: target, **options)
        finally:
            checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    saved = {"model": jnp.arange(3.0), "optimizer": {"mu": jnp.zeros(3, jnp.bfloat16)}}
    checkpoints.save(2, saved, {"data": 1}, None)
    checkpoints.close()
    with pytest.raises(ConfigError) as raised:
        restore({"model": jnp.zeros(3), "optimizer": moments})
    assert str(raised.value) == f"checkpoint=2: {message}"
    state, position = restore({"model": jnp.zeros(3, jnp.bfloat16)}, partial=True)
    np.testing.assert_array_equal(state["model"], [0, 1, 2])
    assert state["model"].dtype == jnp.bfloat16 and position == {"data": 1}
