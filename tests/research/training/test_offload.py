"""Moments in the host's memory: the same numbers, and in a TPU's program none on the device."""

import dataclasses

import jax
import numpy as np
import pytest

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.parallel import MeshConfig
from research.planning.plan import plan
from research.planning.step import Setup, check_setup
from research.training import OptimizerConfig, TrainingConfig, check, train

MODEL = DecoderConfig(
    vocab_size=16,
    width=64,
    num_layers=4,
    attention=AttentionConfig(num_heads=4, head_dim=32),
    mlp=MlpConfig(256),
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=16,
    batch_size=8,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)


def quiet(step, steps, metrics):
    """Shows nothing."""


@pytest.fixture
def run(monkeypatch):
    # a CPU has a memory of that name as well, which is how the numbers can be seen here
    monkeypatch.setattr(check, "check_host", lambda *given: None)

    def run(steps, offload, workdir=None, **options):
        training = TrainingConfig(steps, OptimizerConfig(**options), eval_batches=0)
        mesh = MeshConfig(data=1, offload=offload)
        return train(MODEL, DATA, training, mesh=mesh, workdir=workdir, progress=quiet)

    return run


@pytest.mark.parametrize(
    "options",
    [dict(), pytest.param(dict(moments="8bit"), marks=pytest.mark.slow)],
    ids=["full", "8bit"],
)
def test_the_numbers_are_those_of_moments_on_the_device(run, options):
    want, got = run(3, False, **options), run(3, True, **options)
    assert got.metrics["loss"] == pytest.approx(want.metrics["loss"], rel=1e-6)
    for a, b in zip(jax.tree.leaves(got.model), jax.tree.leaves(want.model), strict=True):
        # Adam divides by the root of a small second moment, and its steps are 1e-3: here and there
        # rounding shows
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert np.abs(a - b).mean() < 1e-7


SHARDED = """
import jax, numpy as np
from research.parallel import MeshConfig
from research.training import OptimizerConfig, TrainingConfig, check, run, train
from research.training.state import TrainState
from tests.research.training.test_offload import DATA, MODEL, quiet

check.check_host = lambda *given: None
kinds = []
run_train = run.Run.train


def look(self, state):
    kinds.append({a.sharding.memory_kind for a in jax.tree.leaves(state.optimizer) if a.ndim})
    return run_train(self, state)


run.Run.train = look
training = TrainingConfig(2, OptimizerConfig(), eval_batches=0)
found = []
for offload in (False, True):
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, sequence=2, offload=offload)
    found.append(train(MODEL, DATA, training, mesh=mesh, progress=quiet))
assert kinds == [{"device"}, {"pinned_host"}], kinds
np.testing.assert_allclose(*(f.metrics["loss"] for f in found), rtol=1e-6)
for a, b in zip(*(jax.tree.leaves(f.model) for f in found), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
print("passed")
"""


def test_on_a_mesh_each_device_has_its_share_there(run_script):
    assert run_script(SHARDED).endswith("passed\n")


def test_a_run_may_go_on_with_its_moments_elsewhere(run, tmp_path):
    """They are no part of what decides the numbers, as the rest of the mesh."""
    want = run(2, False, workdir=tmp_path)
    assert run(2, True, workdir=tmp_path).metrics == want.metrics


def test_what_changes_nothing_is_refused():
    training = TrainingConfig(2, eval_batches=0)
    mesh = MeshConfig(data=1, offload=True)
    with pytest.raises(ConfigError, match="^mesh.offload=True: changes nothing: a CPU's memory is"):
        train(MODEL, DATA, training, mesh=mesh, progress=quiet)
    model = dataclasses.replace(MODEL, remat="full_offload")
    with pytest.raises(ConfigError, match="^model.remat='full_offload': changes nothing: a CPU's"):
        train(model, DATA, training, progress=quiet)


SETUP = Setup(
    dataclasses.replace(MODEL, width=256, mlp=MlpConfig(2048), dtype="bfloat16"),
    "v5e:2x2",
    MeshConfig(data=1, fsdp=4),
    8,
    128,
    TrainingConfig(steps=10),
)


@pytest.mark.tpu_compile
def test_a_plan_without_moments_is_refused():
    setup = dataclasses.replace(SETUP, mesh=MeshConfig(data=1, fsdp=4, offload=True))
    descent = TrainingConfig(10, OptimizerConfig("sgd", b1=0.0))
    with pytest.raises(ConfigError, match="^mesh.offload=True: changes nothing: the optimiser has"):
        check_setup(dataclasses.replace(setup, training=descent))
    with pytest.raises(ConfigError, match="^mesh.offload=True: changes nothing: decoding has no"):
        check_setup(dataclasses.replace(setup, training=None))


@pytest.mark.tpu_compile
def test_a_tpu_has_only_a_layer_s_moments_at_a_time():
    """What is off the device at rest is not back there all at once, in the program's own bytes."""
    there = plan(SETUP)
    mesh = MeshConfig(data=1, fsdp=4, offload=True)
    away = plan(dataclasses.replace(SETUP, mesh=mesh))
    assert there.host == 0 and away.host + away.bytes["moments"] == there.bytes["moments"]
    assert away.bytes["moments"] == 8  # two counters
    # of four layers one is there
    assert there.bytes["total"] - away.bytes["total"] > 0.7 * away.host
