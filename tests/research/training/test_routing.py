"""Training mixtures of experts: their losses, what is reported of them, and the biases' balance."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from research.data import DataConfig, SyntheticConfig
from research.training import OptimizerConfig, TrainingConfig, evaluate, train
from research.training.flops import train_flops_per_token
from research.training.objectives import NextToken
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import make_step

E, K = 4, 2
MOE = MoeConfig(E, 6, top_k=K, balance_weight=0.3, z_weight=0.2)
MODEL = DecoderConfig(
    vocab_size=16, width=8, num_layers=4, attention=AttentionConfig(2), mlp=MlpConfig(12),
    moe=MOE, pattern=("attention",) * 2, feed_forward=("mlp", "moe"), scan=False,
)  # fmt: skip
DATA = DataConfig(
    source="synthetic", sequence_length=8, batch_size=4,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)  # fmt: skip
DESCENT = OptimizerConfig(
    name="sgd", learning_rate=1.0, schedule="constant", b1=0.0, weight_decay=0.0, clip_norm=None
)


def make(**changes):
    config = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, **changes))
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def batch():
    ids = np.random.default_rng(0).integers(0, 16, (4, 9)).astype(np.int32)
    return dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8)),
        segment_ids=np.ones((4, 8), np.int32),
        weights=np.full((4, 8), 0.5, np.float32),
    )


def after_one_step(model, batch, **options):
    training = TrainingConfig(steps=5, **{"optimizer": DESCENT, **options})
    optimizer = make_optimizer(training.optimizer, training.steps)
    state = TrainState.begin(jax.tree.map(jnp.copy, model), optimizer, 0)
    return make_step(training)(state, batch)


def test_the_losses_of_routers_are_minimised_and_reported(batch):
    model = make()
    out = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    total, _, sums = NextToken()(model, batch)
    weight = batch["weights"].sum()
    aux = np.sum(0.3 * np.asarray(out.aux.balance) + 0.2 * np.asarray(out.aux.z))
    np.testing.assert_allclose(total, sums["loss"] + weight * aux, rtol=1e-6)
    state, metrics = after_one_step(model, batch)
    np.testing.assert_allclose(metrics["router_balance"], np.mean(out.aux.balance), rtol=1e-6)
    np.testing.assert_allclose(metrics["router_z"], np.mean(out.aux.z), rtol=1e-6)
    assert metrics["router_drop_rate"] == 0
    share = np.asarray(out.aux.counts_e) / (4 * 8 * K)
    np.testing.assert_array_equal(metrics["router_choices"], out.aux.counts_e)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), -1).mean() / np.log(E)
    np.testing.assert_allclose(metrics["router_entropy"], entropy, rtol=1e-5)

    # descent at rate 1: the router's change is minus its gradient, of which a share is the losses'
    alone = make(balance_weight=0.0, z_weight=0.0)
    other, _ = after_one_step(alone, batch)
    changes = [
        np.asarray(a.model.blocks[1].mlp.router.weight[...] - m.blocks[1].mlp.router.weight[...])
        for a, m in ((state, model), (other, alone))
    ]

    def losses(model):
        stats = model(batch["tokens"], batch["positions"], batch["segment_ids"]).aux
        return jnp.sum(0.3 * stats.balance + 0.2 * stats.z)

    want = jax.grad(losses)(model).blocks[1].mlp.router.weight[...]
    np.testing.assert_allclose(changes[1] - changes[0], want, atol=1e-6)
    assert np.abs(want).max() > 1e-3


def test_micro_batches_give_the_whole_batch_but_for_the_balance(batch):
    """The balance loss is of a micro-batch, as everywhere; all else is the same."""
    options = dict(balance_weight=0.0, capacity_factor=0.6)
    model = make(**options)
    whole, want = after_one_step(model, batch)
    split, got = after_one_step(model, batch, gradient_accumulation=2)
    for name in set(want) - {"router_balance"}:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
    assert want["router_drop_rate"] > 0
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(split.model), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_biases_move_against_the_load_and_by_nothing_else(batch):
    options = dict(router="sigmoid", bias_rate=0.01)
    adam = OptimizerConfig(schedule="constant", learning_rate=0.1, weight_decay=0.5)
    state, metrics = after_one_step(make(**options), batch, optimizer=adam)
    choices = np.asarray(metrics["router_choices"])
    want = 0.01 * np.sign(choices.mean(-1, keepdims=True) - choices)
    biases = [mixture.bias[...] for mixture in state.model.mixtures]
    np.testing.assert_allclose(jnp.stack(biases), want, rtol=1e-6)
    assert np.any(want)


def test_biases_even_the_load():
    """DeepSeek-V3, §2.1.2: no loss balances, and the experts are used evenly all the same."""
    training = TrainingConfig(steps=60, eval_batches=2, log_every=60)
    entropies = []
    for rate in (0.0, 0.01):
        moe = dataclasses.replace(
            MOE, router="sigmoid", bias_rate=rate, balance_weight=0.0, z_weight=0.0, top_k=1
        )
        config = dataclasses.replace(MODEL, moe=moe)
        metrics = train(config, DATA, training, progress=lambda *_: None).metrics
        entropies.append(metrics["eval_router_entropy"])
    assert entropies[1] > 0.9 > 0.8 > entropies[0]


def test_noise_is_new_each_step_and_absent_in_evaluation(batch):
    model = make(router="noisy", balance_weight=0.0, z_weight=0.0)
    # noise of softplus(0) = 0.69 from the first step on
    frozen = dataclasses.replace(DESCENT, learning_rate=1e-30)
    training = TrainingConfig(steps=5, optimizer=frozen)
    optimizer = make_optimizer(training.optimizer, training.steps)
    state = TrainState.begin(jax.tree.map(jnp.copy, model), optimizer, 0)
    losses = []
    for _ in range(3):
        state, metrics = make_step(training)(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    again = after_one_step(model, batch, optimizer=frozen)[1]
    assert float(again["loss"]) == losses[0]
    held_out = [evaluate(model, DATA, batches=2)["loss"] for _ in range(2)]
    assert held_out[0] == held_out[1]


def test_choices_are_in_the_record_and_only_the_tokens_own_experts_are_flops(tmp_path):
    training = TrainingConfig(steps=4, eval_batches=0, log_every=2)
    result = train(MODEL, DATA, training, workdir=tmp_path, progress=lambda *_: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.shape(rows[-1]["router_choices"]) == (2, E)
    assert np.sum(rows[-1]["router_choices"]) == 2 * 4 * 8 * K
    assert "router_choices" not in result.metrics and "router_entropy" in result.metrics
    dense = dataclasses.replace(MODEL, moe=None, feed_forward=("mlp",), mlp=MlpConfig(6 * K))
    routers = 2 * 8 * E
    flops = [
        train_flops_per_token(jax.eval_shape(lambda c=c: Decoder(c, rngs=nnx.Rngs(0))), 8)
        for c in (MODEL, dense)
    ]
    assert flops[0] - flops[1] == 6 * routers
