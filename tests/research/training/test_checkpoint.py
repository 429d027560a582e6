"""Which checkpoints stay: the newest, and the best."""

import jax.numpy as jnp
import numpy as np

from research.training.checkpoint import Checkpoints


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), 1):
        checkpoints.save(step, {"w": jnp.full((3,), step, jnp.float32)}, {"data": step}, loss)
    checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 5]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state, position = checkpoints.restore({"w": jnp.zeros(3)})
    checkpoints.close()
    np.testing.assert_array_equal(state["w"], np.full(3, 5.0))
    assert position == {"data": 5}


def test_nothing_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.restore({"w": jnp.zeros(3)}) is None
    checkpoints.close()
