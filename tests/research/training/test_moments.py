"""8-bit moments against bitsandbytes, their layout, bytes and shards, and what they train."""

import dataclasses
import math
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.parallel.mesh import AXES
from research.training import OptimizerConfig, Preempted, TrainingConfig, train
from research.training.moments import (
    decode,
    dequantize,
    encode,
    layout,
    quantize,
    with_8bit_moments,
)
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from tests.research.training.goldens.bitsandbytes_8bit import BETAS, DECAY, RATE, STEPS, numbers

GOLDEN = Path(__file__).parent / "goldens" / "bitsandbytes_8bit.npz"
QUANTIZE = jax.jit(quantize, static_argnums=(1, 2, 3))
SIGNED = pytest.mark.parametrize("signed", [True, False])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as held:
        return dict(held)


@SIGNED
def test_the_map_is_that_of_bitsandbytes(golden, signed):
    theirs = golden[f"{'signed' if signed else 'unsigned'}/map"]
    ours = decode(jnp.arange(256, dtype=jnp.uint8), signed)
    np.testing.assert_allclose(ours, theirs, rtol=2e-7)
    np.testing.assert_array_equal(encode(jnp.asarray(theirs), signed), np.arange(256))


@SIGNED
def test_blocks_are_quantised_as_by_bitsandbytes(golden, signed):
    name = "signed" if signed else "unsigned"
    x = numbers(100, 8) if signed else np.abs(numbers(101, 8))
    found = quantize(jnp.asarray(x), 1, 256, signed)
    assert found.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(found.codes, golden[f"{name}/codes"])
    np.testing.assert_array_equal(found.scales.ravel(), golden[f"{name}/absmax"])
    np.testing.assert_allclose(dequantize(found), golden[f"{name}/back"], rtol=3e-7)


@SIGNED
def test_every_number_gets_the_nearest_code(signed):
    x = np.random.default_rng(0).uniform(-1 if signed else 0, 1, 4000)
    x = (np.sign(x) * np.abs(x) ** np.linspace(1, 12, x.size)).astype(np.float32)
    codes = np.asarray(decode(jnp.arange(256, dtype=jnp.uint8), signed), np.float64)
    distance = np.abs(codes - x.astype(np.float64)[:, None])
    got = np.take_along_axis(distance, np.asarray(encode(jnp.asarray(x), signed))[:, None], 1)[:, 0]
    np.testing.assert_allclose(got, distance.min(axis=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_blocks_along_any_dimension_are_those_of_a_turned_array(axis):
    x = jax.random.normal(jax.random.key(0), (32, 64, 96))
    turned = jnp.moveaxis(x, axis, -1)
    found = QUANTIZE(x, axis, 32, True)
    flat = QUANTIZE(turned.reshape(-1, 32), 1, 32, True)
    assert found.scales.shape == tuple(n // 32 if i == axis else n for i, n in enumerate(x.shape))
    back = dequantize(flat).reshape(turned.shape)
    np.testing.assert_array_equal(jnp.moveaxis(dequantize(found), axis, -1), back)
    zero = quantize(jnp.zeros((2, 32)), 1, 32, True)
    assert not np.any(dequantize(zero)) and not np.any(zero.scales)


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_updates_are_those_of_bitsandbytes(golden, name):
    make = {"AdamW": optax.adamw, "Lion": optax.lion}[name]
    optimizer = with_8bit_moments(make(RATE, *BETAS, weight_decay=DECAY))
    weight = jnp.asarray(numbers(102))
    state = optimizer.init(weight)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(jnp.asarray(numbers(step)), state, weight)
        weight = optax.apply_updates(weight, updates)
    moments = state[0]
    np.testing.assert_array_equal(moments.mu.codes, golden[f"{name}/codes"])
    if name == "AdamW":
        np.testing.assert_array_equal(moments.nu.codes, golden[f"{name}/codes2"])
    # by less than a thousandth of a step
    np.testing.assert_allclose(weight, golden[f"{name}/weight"], rtol=1e-6, atol=1e-3 * RATE)


@pytest.mark.parametrize(
    "shape, axes, want",
    [
        ((4, 512, 2048), ("embed", "mlp"), (2, 256)),  # 512 = 64 · 8
        ((4, 4096, 14336), ("embed", "mlp"), (1, 64)),
        ((4, 2048, 512), ("mlp", "embed"), (1, 256)),
        ((2, 11008, 4096), ("mlp", "embed"), (1, 32)),  # 8 · 32 · 43
        ((512, 8, 128), ("embed", "heads", "head_dim"), (2, 128)),
        ((2, 8, 128, 512), ("heads", "head_dim", "embed"), (2, 128)),
        ((2, 8, 512, 2048), ("experts", "embed", "mlp"), (3, 256)),
        ((1024, 50304), ("embed", "vocab"), (0, 16)),
        ((50304, 1024), ("vocab", "embed"), None),
        ((2048, 1024), (None, "embed"), None),
        ((12, 1024), ("norm",), None),  # twelve layers' vectors are no matrix
        ((12, 8, 512), ("heads", "head_dim"), (2, 256)),
        ((64, 31, 128), ("embed", "mlp"), None),  # of one layer fewer than 4096
        ((37, 1001), ("embed", "mlp"), None),
        ((20, 512), (None, None), (1, 256)),
    ],
)
def test_blocks_lie_where_a_mesh_can_split_them(shape, axes, want):
    assert layout(shape, axes) == want


MODEL = DecoderConfig(
    vocab_size=16,
    width=64,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, head_dim=32),
    mlp=MlpConfig(512),
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=16,
    batch_size=8,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)


def quiet(step, steps, metrics):
    """Shows nothing."""


def trained(steps=4, model=MODEL, workdir=None, progress=quiet, accumulation=1, **options):
    start = OptimizerConfig(learning_rate=3e-3, warmup_steps=min(steps, 10))
    training = TrainingConfig(
        steps,
        dataclasses.replace(start, **options),
        accumulation,
        eval_batches=int(steps > 4),
        checkpoint_every=2,
    )
    return train(model, DATA, training, workdir=workdir, progress=progress)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_moments_are_a_byte_and_a_little(name):
    def size(moments):
        optimizer = make_optimizer(OptimizerConfig(name, moments=moments), 10)
        model = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
        state = jax.eval_shape(optimizer.init, model)
        table = MODEL.vocab_size * MODEL.width
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)) - 4 * table

    assert size("8bit") / size("full") == pytest.approx((1 + 4 / 64) / 4, rel=0.1)


def test_a_decoder_learns_as_with_float32_moments():
    found = {moments: trained(100, moments=moments) for moments in ("full", "8bit")}
    losses = {moments: result.metrics["eval_loss"] for moments, result in found.items()}
    assert losses["full"] < 0.5 * math.log(14), losses
    assert losses["8bit"] == pytest.approx(losses["full"], rel=0.05), losses
    assert losses["8bit"] != losses["full"]


@pytest.mark.slow
def test_micro_batches_and_a_master_copy_change_little():
    whole = trained(moments="8bit")
    parts = trained(moments="8bit", accumulation=2)
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)
    half = dataclasses.replace(MODEL, param_dtype="bfloat16")
    master = trained(moments="8bit", model=half, master=True)
    assert master.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-2)
    assert {a.dtype for a in jax.tree.leaves(master.model)} == {jnp.dtype("bfloat16")}


def test_decay_and_clipping_are_those_of_the_optimiser_itself():
    """One step from no moments, before anything is rounded, is that of full ones."""
    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()

    def step(moments):
        optimizer = make_optimizer(OptimizerConfig(moments=moments, weight_decay=0.3), 10)
        gradients = jax.tree.map(jnp.sin, model)
        return jax.jit(lambda m: optimizer.update(gradients, optimizer.init(m), m)[0])(model)

    for a, b in zip(jax.tree.leaves(step("8bit")), jax.tree.leaves(step("full")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_a_resumed_run_is_bit_identical(tmp_path):
    def stop(step, steps, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    want = trained(moments="8bit")
    with pytest.raises(Preempted):
        trained(moments="8bit", workdir=tmp_path, progress=stop)
    got = trained(moments="8bit", workdir=tmp_path)
    assert got.metrics == want.metrics
    for a, b in zip(jax.tree.leaves(got.model), jax.tree.leaves(want.model), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="^training.optimizer.moments='full': workdir .* '8bit'"):
        trained(workdir=tmp_path)


def test_what_changes_nothing_or_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="^moments='4bit': must be one of full"):
        OptimizerConfig(moments="4bit")
    with pytest.raises(ConfigError, match="^moments='8bit': changes nothing: sgd with b1=0"):
        OptimizerConfig("sgd", b1=0.0, moments="8bit")
    with pytest.raises(ConfigError, match="^moments='8bit': must be 'full': adafactor"):
        OptimizerConfig("adafactor", moments="8bit")
    optimizer = make_optimizer(OptimizerConfig(moments="8bit"), 10)
    tiny = dataclasses.replace(MODEL, width=8, mlp=MlpConfig(16))
    one = AbstractMesh((1,) * len(AXES), AXES)
    with pytest.raises(ConfigError, match="^optimizer.moments='8bit': changes nothing: no weight"):
        abstract_state(tiny, optimizer, one)
    sizes = tuple(16 if axis == "tensor" else 1 for axis in AXES)
    wide = AbstractMesh(sizes, AXES)
    with pytest.raises(
        ConfigError,
        match="^optimizer.moments='8bit': mesh.tensor=16 must divide the 8 blocks of .*/scales",
    ):
        heads = dataclasses.replace(MODEL, attention=AttentionConfig(num_heads=16, head_dim=32))
        abstract_state(heads, optimizer, wide)


SHARDED = """
import jax, numpy as np
from research.parallel import MeshConfig, abstract_batch, make_mesh, shardings, use_mesh
from research.training import OptimizerConfig, TrainingConfig, train
from research.training.moments import Quantized
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import make_step
from tests.research.training.test_moments import DATA, MODEL, quiet

TRAINING = TrainingConfig(3, OptimizerConfig(learning_rate=3e-3, moments="8bit"), eval_batches=0)


def losses(mesh, devices=None):
    seen = []
    result = train(MODEL, DATA, TRAINING, mesh=mesh, devices=devices,
                   progress=lambda step, steps, metrics: seen.append(metrics["loss"]))
    return [*seen[1:], result.metrics["loss"], result.metrics["gradient_norm"]], result.model


want, reference = losses(MeshConfig(data=1), jax.devices()[:1])
optimizer = make_optimizer(TRAINING.optimizer, TRAINING.steps)
for config in (
    MeshConfig(data=1, fsdp=8, zero=1), MeshConfig(data=1, fsdp=2, tensor=4),
):
    got, model = losses(config)
    print(config, got, flush=True)
    # a rounding that tips over moves a moment by a code, and Adam's step is as large
    np.testing.assert_allclose(got, want, rtol=2e-4, err_msg=str(config))
    mesh = make_mesh(config)
    state = abstract_state(MODEL, optimizer, mesh, config.zero_stage)
    batch = abstract_batch(mesh, 8, 16)
    with use_mesh(mesh):
        compiled = make_step(TRAINING, stage=config.zero_stage).lower(state, batch).compile()
    new = compiled.output_shardings[0].optimizer
    found = [q for q in jax.tree.leaves(state.optimizer, is_leaf=lambda q: isinstance(q, Quantized))
             if isinstance(q, Quantized)]
    rests = [q for q in jax.tree.leaves(new, is_leaf=lambda q: isinstance(q, Quantized))
             if isinstance(q, Quantized)]
    # two moments of seven weights
    assert len(found) == len(rests) == 14
    ways = config.fsdp * config.tensor
    held = 0
    for array, rest in zip(jax.tree.leaves(found), jax.tree.leaves(rests), strict=True):
        share = int(np.prod(rest.shard_shape(array.shape)))
        assert share * ways == array.size, (array, rest)
        held += share * array.dtype.itemsize
    numbers = 2 * 2 * (4 * 64 * 128 + 3 * 64 * 512)
    assert held == numbers * (1 + 4 * (4 * 128 / 32 + 3 * 512 / 64) / (4 * 128 + 3 * 512)) / ways
print("passed")
"""


def test_they_are_split_as_the_weights_are_and_train_alike(run_script):
    assert run_script(SHARDED).endswith("passed\n")
