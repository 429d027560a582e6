"""Training of bfloat16 parameters: float32 moments, and float32 copies that are updated."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.weights import flat
from research.data import DataConfig, SyntheticConfig
from research.training import Objective, OptimizerConfig, Sums, TrainingConfig, train
from research.training.optimizers import OPTIMIZERS, MasterState, decayed, make_optimizer
from research.training.state import TrainState
from research.training.step import make_gradients

MODEL = DecoderConfig(
    vocab_size=16,
    width=16,
    num_layers=2,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(24),
    tie_embeddings=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=8,
    batch_size=4,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()


def random_like(model, seed, dtype=None, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(scale * rng.normal(size=a.shape), dtype or a.dtype), model
    )


def steps(optimizer, params, number, scale=1.0):
    """``params`` and the optimiser's state after ``number`` updates by bfloat16 gradients."""

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for step in range(number):
        params, state = update(params, state, random_like(params, step, jnp.bfloat16, scale))
    return params, state


def master(state):
    [found] = [s for s in jax.tree.leaves(state, is_leaf=is_master) if is_master(s)]
    return found


def is_master(node):
    return isinstance(node, MasterState)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_master_copy_and_its_moments_are_those_of_float32_parameters(model, name):
    """Exactly: the copy does not know that the parameters are its rounding."""
    slow = dict(b2=0.999) if name in ("adamw", "lion", "muon") else {}
    optimizer = make_optimizer(OptimizerConfig(name, learning_rate=1e-5, **slow), 9)
    rounded, state = steps(optimizer, model, 3)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), model)
    want, want_state = steps(optimizer, wide, 3)
    state = master(state)
    for name, a in flat(state.master).items():
        np.testing.assert_array_equal(a, flat(want)[name], err_msg=name)
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), flat(rounded)[name], err_msg=name)
    moments = jax.tree.leaves(state.inner)
    assert {a.dtype for a in moments if a.ndim} <= {jnp.dtype("float32")}
    for a, b in zip(moments, jax.tree.leaves(want_state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_copy_moments_are_float32_too(model, name):
    optimizer = make_optimizer(OptimizerConfig(name, master=False), 9)
    state = jax.eval_shape(optimizer.init, model)
    assert not any(map(is_master, jax.tree.leaves(state, is_leaf=is_master)))
    assert {a.dtype for a in jax.tree.leaves(state) if a.ndim} <= {jnp.dtype("float32")}
    one = jnp.ones(3, jnp.bfloat16)
    updates, _ = jax.eval_shape(lambda a: optimizer.update(a, optimizer.init(a), a), one)
    assert updates.dtype == jnp.float32


def test_the_second_moment_of_bfloat16_gradients_does_not_freeze():
    """In bfloat16, 0.999 · v + 0.001 · g² rounds to v long before v reaches g²."""
    config = OptimizerConfig(b2=0.999, clip_norm=None, master=False)
    optimizer = make_optimizer(config, 1000)
    weight = jnp.ones(4, jnp.bfloat16)
    gradient = jnp.full(4, 0.5, jnp.bfloat16)

    def update(state, _):
        return optimizer.update(gradient, state, weight)[1], None

    state, _ = jax.lax.scan(update, optimizer.init(weight), length=1000)
    want = 0.25 * (1 - 0.999**1000)
    [nu] = [v for path, v in flat(state).items() if "nu" in path]
    np.testing.assert_allclose(nu, np.full(4, want), rtol=1e-4)


def test_fine_tuning_at_a_small_rate_moves_every_weight_as_torch_does(model):
    torch = pytest.importorskip("torch")
    number, rate = 20, 1e-5
    config = OptimizerConfig(learning_rate=rate, schedule="constant", clip_norm=None, b2=0.999)
    rounded, state = steps(make_optimizer(config, number), model, number)
    copies = flat(master(state).master)
    applies = flat(decayed(model))
    before = {n: np.asarray(a, np.float64) for n, a in flat(model).items()}
    theirs = {n: torch.tensor(a) for n, a in before.items()}
    groups = [
        {"params": [t for n, t in theirs.items() if applies[n] == on], "weight_decay": on * 0.1}
        for on in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=config.eps)
    for step in range(number):
        for name, gradient in flat(random_like(model, step, jnp.bfloat16)).items():
            theirs[name].grad = torch.tensor(np.asarray(gradient, np.float64))
        reference.step()
    moved = total = moved_in_bfloat16 = 0
    for name, start in before.items():
        # a float32 near 1 has steps of 1.2e-7
        np.testing.assert_allclose(copies[name], theirs[name].numpy(), atol=1e-6, err_msg=name)
        rounding = np.asarray(copies[name].astype(jnp.bfloat16))
        np.testing.assert_array_equal(flat(rounded)[name], rounding, err_msg=name)
        moved += np.sum(np.asarray(copies[name]) != start)
        moved_in_bfloat16 += np.sum(np.asarray(flat(rounded)[name], np.float64) != start)
        total += start.size
    assert moved == total
    assert moved_in_bfloat16 < 0.8 * total  # the rest is only in the copy


def test_nothing_changes_for_float32_parameters():
    """Neither the program nor the structure of the state, of which checkpoints consist."""
    model = jax.eval_shape(
        lambda: Decoder(dataclasses.replace(MODEL, param_dtype="float32"), rngs=nnx.Rngs(0))
    )

    def program(on):
        optimizer = make_optimizer(OptimizerConfig(master=on), 9)
        state = jax.eval_shape(optimizer.init, model)
        return str(jax.make_jaxpr(optimizer.update)(model, state, model)), flat(state).keys()

    assert program(True) == program(False)


def test_a_copy_leaves_the_biases_of_a_router_to_the_router():
    """They are float32 and change outside the optimiser, by 0.5 in each step here."""
    experts = MoeConfig(4, 8, router="sigmoid", bias_rate=0.5)
    config = dataclasses.replace(MODEL, num_layers=1, feed_forward=("moe",), moe=experts)
    model = Decoder(config, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(OptimizerConfig(), 9)
    state = TrainState.begin(model, optimizer, 0)
    update = jax.jit(lambda s: s.apply(jax.tree.map(jnp.zeros_like, s.model), optimizer))
    for _ in range(2):
        state = update(state).rebalance(jnp.array([[8.0, 0, 0, 0]]))
    [bias] = [a for name, a in flat(state.model).items() if name.endswith("mlp/bias")]
    np.testing.assert_array_equal(bias.ravel(), [-1, 1, 1, 1])


class Product(Objective):
    """``weight · Σ x``, whose gradient is ``Σ x``."""

    def __call__(self, model, batch, key=None, frozen=None):
        total = model["weight"].astype(jnp.float32) * jnp.sum(batch["x"])
        return Sums(total, jnp.float32(1), {})


def test_gradients_of_micro_batches_are_summed_in_float32():
    x = np.array([1] + [2.0**-9] * 15, np.float32)  # in bfloat16 1 + 2⁻⁹ is 1
    gradients = make_gradients(TrainingConfig(1, gradient_accumulation=16), Product())
    model = {"weight": jnp.bfloat16(1)}
    total, _, _ = jax.jit(gradients)(model, {"x": x}, jax.random.key(0))
    assert float(total["weight"]) == 1 + 15 * 2.0**-9


def quiet(step, total, metrics):
    """Shows nothing."""


def run(workdir):
    training = TrainingConfig(2, eval_batches=0, checkpoint_every=1)
    return train(MODEL, DATA, training, workdir=workdir, progress=quiet)


def test_a_resumed_run_has_the_same_copies(tmp_path):
    want = run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    got = run(tmp_path / "run")
    assert got.metrics == want.metrics
    for name, a in flat(got.model).items():
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, flat(want.model)[name], err_msg=name)
