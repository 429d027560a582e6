"""Schedules at their key steps, AdamW against torch, and what each optimiser treats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.training import OptimizerConfig, TrainingConfig
from research.training.optimizers import (
    OPTIMIZERS,
    decayed,
    make_optimizer,
    make_schedule,
    muon_dimensions,
)

MODEL = DecoderConfig(
    vocab_size=16,
    width=8,
    num_layers=2,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, qkv_bias=True),
    mlp=MlpConfig(16, bias=True),
    norm="layernorm",
    norm_bias=True,
    position="learned",
    max_length=8,
    tie_embeddings=False,
)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()


def named(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.mark.parametrize(
    "options, values",
    [
        (dict(schedule="constant"), {0: 1.0, 50: 1.0, 99: 1.0}),
        (dict(schedule="linear"), {0: 1.0, 50: 0.55, 100: 0.1}),
        (dict(schedule="cosine"), {0: 1.0, 50: 0.55, 100: 0.1, 25: 0.1 + 0.45 * (1 + 2**-0.5)}),
        (dict(schedule="wsd"), {0: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        (dict(schedule="wsd", warmup_steps=10), {0: 0.1, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        (
            dict(schedule="cosine", warmup_steps=20),
            {0: 0.05, 10: 0.525, 20: 1.0, 60: 0.55, 100: 0.1},
        ),
        (dict(schedule="linear", warmup_steps=1), {0: 1.0, 1: 1.0, 100: 0.1}),
        (dict(schedule="constant", warmup_steps=4), {0: 0.25, 2: 0.625, 4: 1.0, 99: 1.0}),
        (dict(schedule="linear", final_fraction=0.0), {50: 0.5, 100: 0.0}),
    ],
)
def test_schedules_at_their_key_steps(options, values):
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **options), 100)
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(2 * value, abs=1e-6), step


def test_weight_decay_spares_norms_and_biases(model):
    for name, applies in named(decayed(model)).items():
        assert applies == (not ("norm" in name or "bias" in name)), name


def test_muon_takes_the_maps_and_adam_the_rest(model):
    dimensions = named(muon_dimensions(model))
    shapes = named(model)
    for name, leaf in shapes.items():
        found = [n for n in dimensions if n.startswith(name + "/") or n == name]
        is_map = "blocks" in name and "weight" in name and "norm" not in name
        assert bool(found) == is_map, (name, leaf.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_fits_a_tiny_problem(model, name):
    rate = {"sgd": 0.3, "lion": 3e-3}.get(name, 2e-2)
    config = OptimizerConfig(name=name, learning_rate=rate, schedule="constant")
    optimizer = make_optimizer(config, 30)
    tokens = jax.random.randint(jax.random.key(0), (4, 8), 0, 16)

    def loss(model):
        logits = model(tokens[:, :-1]).logits_btv
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(model, moments):
        value, gradients = jax.value_and_grad(loss)(model)
        updates, moments = optimizer.update(gradients, moments, model)
        return optax.apply_updates(model, updates), moments, value

    trained, moments = model, optimizer.init(model)
    values = []
    for _ in range(30):
        trained, moments, value = step(trained, moments)
        values.append(float(value))
    assert values[-1] < 0.75 * values[0], values


def test_adamw_and_clipping_against_torch(model):
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(
        learning_rate=1e-2, schedule="linear", warmup_steps=3, weight_decay=0.3, clip_norm=0.5
    )
    optimizer = make_optimizer(config, 10)
    schedule = make_schedule(config, 10)
    applies = named(decayed(model))
    theirs = {n: torch.tensor(np.array(a, np.float64)) for n, a in named(model).items()}
    groups = [
        {"params": [t for n, t in theirs.items() if applies[n]], "weight_decay": 0.3},
        {"params": [t for n, t in theirs.items() if not applies[n]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=config.eps)
    ours, moments = model, optimizer.init(model)
    update = jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    for step in range(6):
        scale = (0.001, 1.0)[step % 2]  # below and above the clipping norm
        gradients = jax.tree.map(
            lambda a, scale=scale: jnp.asarray(scale * rng.normal(size=a.shape), jnp.float32), ours
        )
        updates, moments = update(gradients, moments, ours)
        ours = optax.apply_updates(ours, updates)
        for name, gradient in named(gradients).items():
            theirs[name].grad = torch.tensor(np.array(gradient, np.float64))
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        reference.step()
    for name, leaf in named(ours).items():
        np.testing.assert_allclose(leaf, theirs[name].numpy(), atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="adam"), "name='adam': must be one of adamw"),
        (dict(schedule="cos"), "schedule='cos': must be one of cosine"),
        (dict(learning_rate=0.0), "learning_rate=0.0: must be > 0"),
        (dict(learning_rate=float("nan")), "learning_rate=nan: must be a finite number"),
        (dict(warmup_steps=-1), "warmup_steps=-1: must be ≥ 0"),
        (dict(final_fraction=1.1), "final_fraction=1.1: must be in"),
        (dict(decay_fraction=-0.1), "decay_fraction=-0.1: must be in"),
        (dict(b1=1.0), "b1=1.0: must be in"),
        (dict(b2=-0.1), "b2=-0.1: must be in"),
        (dict(eps=0.0), "eps=0.0: must be > 0"),
        (dict(weight_decay=-1.0), "weight_decay=-1.0: must be ≥ 0"),
        (dict(clip_norm=0.0), "clip_norm=0.0: must be > 0 or None"),
        (dict(name="sgd", b2=0.9), "b2=0.9: changes nothing: name='sgd' does not read it"),
        (dict(name="lion", eps=1e-6), "eps=1e-06: changes nothing: name='lion' does not"),
        (dict(name="adafactor", b1=0.0), "b1=0.0: changes nothing: name='adafactor' does not"),
        (dict(decay_fraction=0.1), "decay_fraction=0.1: changes nothing: schedule='cosine'"),
        (dict(schedule="constant", final_fraction=0.0), "final_fraction=0.0: changes nothing: sch"),
    ],
)
def test_optimiser_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps=0: must be > 0"),
        (dict(gradient_accumulation=0), "gradient_accumulation=0: must be > 0"),
        (dict(z_loss=-1.0), "z_loss=-1.0: must be ≥ 0"),
        (dict(eval_every=0), "eval_every=0: must be > 0"),
        (dict(eval_batches=-1), "eval_batches=-1: must be ≥ 0"),
        (dict(checkpoint_every=0), "checkpoint_every=0: must be > 0"),
        (dict(keep=0), "keep=0: must be > 0"),
        (dict(log_every=0), "log_every=0: must be > 0"),
        (dict(optimizer=OptimizerConfig(warmup_steps=11)), "optimizer.warmup_steps=11: .*steps=10"),
        (
            dict(optimizer=OptimizerConfig(schedule="wsd", warmup_steps=9)),
            "optimizer.warmup_steps=9: with a decay of 2 must be at most steps=10",
        ),
    ],
)
def test_training_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        TrainingConfig(**{"steps": 10, **options})
    assert "\n" not in str(caught.value)


def test_configs_are_hashable():
    """`make_step` is cached by its configuration."""
    config = TrainingConfig(steps=10)
    assert hash(config) == hash(dataclasses.replace(config))
