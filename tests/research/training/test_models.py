"""A module that is no decoder is trained, evaluated, resumed, loaded and sharded like one."""

import dataclasses
import itertools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.config import ConfigError
from layers.linear import Linear
from research.training import (
    Objective,
    OptimizerConfig,
    Preempted,
    Sums,
    TrainingConfig,
    load_model,
    train,
)
from tests.research.training.test_resume import DATA, assert_same, quiet


class Regression(nnx.Module):
    """``y = W₂ tanh(W₁ x)``."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.hidden = Linear(
            "bd,df->bf", (4, width), ("embed", "mlp"), ("batch", "mlp"), rngs=rngs, bias=True
        )
        self.out = Linear("bf,fo->bo", (width, 1), ("mlp", None), ("batch", None), rngs=rngs)

    def __call__(self, x_bd):
        return self.out(jnp.tanh(self.hidden(x_bd)))[:, 0]


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    width: int = 16

    def build(self, rngs):
        return Regression(self.width, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Squares(Objective):
    """Mean square error, in the unit of ``y`` squared."""

    def __call__(self, model, batch, key=None, frozen=None) -> Sums:
        square_b = jnp.square(model(batch["x"]) - batch["y"])
        return Sums(square_b.sum(), jnp.float32(square_b.size), {"loss": square_b.sum()})


class Points:
    """``y = x₀ − 2 x₁`` at points that a counter gives."""

    name = "points"
    batch_size = 16

    def __init__(self):
        self.count = 0

    def batch(self, number):
        x = np.random.default_rng(number).standard_normal((16, 4)).astype(np.float32)
        return dict(x=x, y=x[:, 0] - 2 * x[:, 1])

    def next(self, step, model):
        self.count += 1
        return self.batch(self.count)

    def held_out(self, batches):
        return map(self.batch, itertools.islice(itertools.count(10_000), batches))

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


TRAINING = TrainingConfig(
    steps=40, eval_batches=2, eval_every=20, checkpoint_every=10, log_every=1,
    optimizer=OptimizerConfig(learning_rate=3e-2),
)  # fmt: skip


def run(workdir=None, training=TRAINING, **options):
    return train(
        RegressionConfig(), None, training, objective=Squares(), source=Points(), workdir=workdir,
        **{"progress": quiet, **options},
    )  # fmt: skip


def test_any_module_is_trained_resumed_and_loaded(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.metrics["eval_loss"] < 1.0  # of a variance of 5

    def stop(step, steps, metrics):
        if step == 15:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        run(tmp_path / "parted", progress=stop)
    parted = run(tmp_path / "parted")
    assert parted.metrics == whole.metrics
    assert_same(tmp_path / "whole", tmp_path / "parted", RegressionConfig())
    loaded = load_model(tmp_path / "whole", model=RegressionConfig())
    for a, b in zip(*map(jax.tree.leaves, (loaded, whole.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    parts = run(training=dataclasses.replace(TRAINING, gradient_accumulation=4))
    for a, b in zip(*map(jax.tree.leaves, (parts.model, whole.model)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_another_model_is_another_run(tmp_path):
    run(tmp_path, TrainingConfig(steps=1))
    with pytest.raises(ConfigError, match="model.width=8: workdir .* was begun with 16"):
        train(
            RegressionConfig(8), None, TrainingConfig(steps=1), objective=Squares(),
            source=Points(), workdir=tmp_path,
        )  # fmt: skip


def test_what_builds_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"model='dict': must be a DecoderConfig or have build"):
        train({}, DATA, TrainingConfig(steps=1))  # type: ignore[arg-type]


MESHES = """
import jax, numpy as np
from layers.config import ConfigError
from research.parallel import MeshConfig
from tests.research.training.test_models import run

alone = run(devices=jax.devices()[:1]).model
for axes in (dict(data=8), dict(data=2, fsdp=4), dict(data=1, fsdp=4, tensor=2)):
    model = run(mesh=MeshConfig(**axes)).model
    for a, b in zip(*map(jax.tree.leaves, (model, alone)), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), atol=1e-4)
    ways = {a.size // a.addressable_shards[0].data.size for a in jax.tree.leaves(model)}
    assert max(ways) == axes.get("fsdp", 1) * axes.get("tensor", 1), (axes, ways)
for axes, message in (
    (dict(data=2, fsdp=4, zero=1), "mesh.zero=1: must be 3"),
    (dict(data=-1, fsdp=1, stage=2), "mesh.stage=2: must be 1"),
):
    try:
        run(mesh=MeshConfig(**axes))
    except ConfigError as error:
        assert message in str(error), error
    else:
        raise AssertionError(axes)
print("passed")
"""


def test_any_module_is_sharded(run_script):
    assert run_script(MESHES).endswith("passed\n")
