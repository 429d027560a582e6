"""Pairs of rows with a frozen reference: the same gradients on any mesh, with any accumulation."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.sharding import spec
from research.data import DataConfig, SyntheticConfig
from research.training import Objective, OptimizerConfig, Sums, TrainingConfig, train
from research.training.objectives import NextToken, cross_entropy
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import finish, make_gradients, make_step, split_batch

MODEL = DecoderConfig(16, 16, 2, attention=AttentionConfig(2), mlp=MlpConfig(16), scan=False)
ROWS, LENGTH = 32, 8


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
    """DPO (2305.18290, eq. 7): ``−log σ(β (margin of the chosen − margin of the rejected))``.

    Rows 2i are chosen, rows 2i + 1 rejected; ``frozen`` is the reference policy.
    """

    beta: float = 0.5
    rows_together: ClassVar[int] = 2

    def __call__(self, model, batch, key=None, frozen=None) -> Sums:
        margin_b = score(model, batch) - jax.lax.stop_gradient(score(frozen, batch))
        margin_p2 = jnp.reshape(margin_b, (-1, 2), out_sharding=spec("batch", None))
        chosen_p, rejected_p = margin_p2[:, 0], margin_p2[:, 1]
        loss_p = -jax.nn.log_sigmoid(self.beta * (chosen_p - rejected_p))
        sums = {"loss": jnp.sum(loss_p), "accuracy": jnp.sum(chosen_p > rejected_p)}
        return Sums(sums["loss"], jnp.asarray(loss_p.size, jnp.float32), sums)


def score(model, batch):
    logits_btv = model(batch["tokens"], batch["positions"], batch["segment_ids"]).logits_btv
    nats_bt, _ = cross_entropy(logits_btv, batch["targets"])
    return -jnp.sum(nats_bt * batch["weights"], axis=1)


def make(seed):
    return jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(seed)))()


@pytest.fixture(scope="module")
def policy():
    return make(0)


@pytest.fixture(scope="module")
def reference():
    return make(1)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 16, (ROWS, LENGTH + 1)).astype(np.int32)
    return dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy(),
        segment_ids=np.ones((ROWS, LENGTH), np.int32),
        # uneven over rows, so that no part of the batch weighs as another
        weights=(rng.random((ROWS, LENGTH)) * np.arange(ROWS)[:, None]).astype(np.float32) / ROWS,
    )


@pytest.fixture(scope="module")
def want(policy, reference, batch):
    """Loss and gradient of the mean over all pairs, written out."""

    def mean(model):
        margin = score(model, batch) - score(reference, batch)
        return jnp.mean(jax.nn.softplus(-0.5 * (margin[0::2] - margin[1::2])))

    return jax.jit(jax.value_and_grad(mean))(policy)


def gradients_of(training, objective, stage=3):
    @jax.jit
    def found(model, batch, frozen):
        of_batch = make_gradients(training, objective, stage)
        gradients, denominator, sums = of_batch(model, batch, jax.random.key(0), frozen)
        return finish(gradients, denominator, training), denominator, sums

    return found


def close(gradients, want):
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want))
    assert scale > 1e-2
    for got, g in zip(*map(jax.tree.leaves, (gradients, want)), strict=True):
        np.testing.assert_allclose(got, g, atol=2e-6 * scale)


@pytest.mark.parametrize("parts", [1, 4])
def test_pairs_have_the_gradient_of_the_mean_over_all_pairs(policy, reference, batch, want, parts):
    training = TrainingConfig(steps=1, gradient_accumulation=parts)
    gradients, denominator, sums = gradients_of(training, Preference())(policy, batch, reference)
    assert float(denominator) == ROWS / 2
    np.testing.assert_allclose(sums["loss"] / denominator, want[0], rtol=1e-5)
    close(gradients, want[1])


def test_rows_that_belong_together_stay_together():
    rows = {"weights": np.arange(12.0)[:, None] * np.ones(5)}
    for parts, together in ((2, 2), (3, 2), (2, 3), (4, 1)):
        got = split_batch(rows, parts, together)["weights"]
        assert got.shape == (parts, 12 // parts, 5)
        groups = np.asarray(got)[..., 0].reshape(-1, together)
        np.testing.assert_array_equal(groups, groups[:, :1] + np.arange(together))
        np.testing.assert_array_equal(np.sort(groups, axis=None), np.arange(12))


def test_frozen_trees_are_arguments(policy, reference, batch, want):
    training = TrainingConfig(
        steps=1, optimizer=OptimizerConfig(name="sgd", b1=0.0, weight_decay=0.0, clip_norm=None)
    )
    optimizer = make_optimizer(training.optimizer, training.steps)
    step = make_step(training, Preference())
    losses = []
    for frozen in (reference, make(2)):
        state = TrainState.begin(jax.tree.map(jnp.copy, policy), optimizer, 0)
        _, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(float(want[0]), rel=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3
    assert step._cache_size() == 1


# Uneven micro-batches of tokens and of pairs, whatever the mesh and the stage of ZeRO.
MESHES = """
import jax
from research.parallel import MeshConfig, make_mesh, shard_batch, shardings, use_mesh
from research.training import TrainingConfig
from research.training.objectives import NextToken
from tests.research.training.test_objectives import Preference, batch, close, gradients_of, make

rows = batch.__wrapped__()
policy, reference = make(0), make(1)
MESHES = (
    (dict(data=2, fsdp=2, tensor=2), 2, 4),
    (dict(data=1, fsdp=4, sequence=2), 1, 2),
)
for objective, meshes in ((Preference(), MESHES), (NextToken(0.1), MESHES[:1])):
    def of(parts, stage, *arguments):
        training = TrainingConfig(steps=1, gradient_accumulation=parts)
        return gradients_of(training, objective, stage)(*arguments)[0]
    want = of(1, 3, policy, rows, reference)
    for axes, stage, parts in meshes:
        mesh = make_mesh(MeshConfig(**axes, zero=stage))
        rests = shardings(policy, mesh, split=stage == 3)
        model = jax.device_put(policy, rests)
        frozen = jax.device_put(reference, shardings(reference, mesh))
        with use_mesh(mesh):
            sharded = shard_batch(rows, mesh, model.config)
            got = of(parts, stage, model, sharded, frozen)
        close(jax.device_get(got), want)
        print(objective, axes, stage, parts, flush=True)
print("passed")
"""


def test_gradients_on_a_mesh_are_those_of_one_device(run_script):
    assert run_script(MESHES).endswith("passed\n")


def test_an_objective_is_trained_evaluated_and_logged(tmp_path):
    """The whole loop: NextToken given by name is the default's run, bit for bit."""
    data = DataConfig(
        source="synthetic", sequence_length=8, batch_size=4,
        synthetic=SyntheticConfig(task="copy", vocab_size=16),
    )  # fmt: skip
    training = TrainingConfig(steps=4, eval_batches=1, eval_every=2)
    quiet = dict(progress=lambda *_: None)
    weighted = dataclasses.replace(training, z_loss=0.1)
    plain = train(MODEL, data, weighted, **quiet)
    named = train(MODEL, data, training, objective=NextToken(0.1), **quiet, workdir=tmp_path)
    assert named.metrics == plain.metrics
    with pytest.raises(ConfigError, match="objective.z_loss=0.2: workdir .* was begun with 0.1"):
        train(MODEL, data, training, objective=NextToken(0.2), **quiet, workdir=tmp_path)
    with pytest.raises(ConfigError, match="training.z_loss=0.1: must be 0 with an objective"):
        train(MODEL, data, weighted, objective=NextToken(), **quiet)
    with pytest.raises(ConfigError, match="z_loss=-1.0: must be ≥ 0"):
        NextToken(-1)


def test_a_run_reads_its_reference(policy, reference):
    """A policy that is its own reference has margins of 0, so a loss of log 2; others have not."""
    data = DataConfig(
        source="synthetic", sequence_length=8, batch_size=4,
        synthetic=SyntheticConfig(task="copy", vocab_size=16),
    )  # fmt: skip
    still = OptimizerConfig(learning_rate=1e-9)
    training = TrainingConfig(1, still, gradient_accumulation=2, eval_batches=1)
    options = dict(objective=Preference(), init=lambda fresh: policy, progress=lambda *_: None)
    same, other = (
        train(MODEL, data, training, frozen=jax.tree.map(jnp.copy, frozen), **options).metrics
        for frozen in (policy, reference)
    )
    for name in ("loss", "eval_loss"):
        assert same[name] == pytest.approx(np.log(2), rel=1e-6)
        assert abs(other[name] - np.log(2)) > 1e-3


@pytest.mark.parametrize(
    "batch_size, parts, message",
    [
        (5, 1, "batch_size=5: the 5 rows of a device must be a multiple of 2"),
        (12, 4, "gradient_accumulation=4: must divide the 6 groups of a device"),
    ],
)
def test_rows_that_could_not_stay_together_are_refused(batch_size, parts, message):
    data = DataConfig(
        source="synthetic", sequence_length=8, batch_size=batch_size,
        synthetic=SyntheticConfig(task="copy", vocab_size=16),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        train(MODEL, data, TrainingConfig(steps=1, gradient_accumulation=parts),
              objective=Preference())  # fmt: skip
