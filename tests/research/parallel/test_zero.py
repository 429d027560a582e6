"""ZeRO's stages: the paper's bytes, what the program moves, and the run of one device."""

import dataclasses

import jax
import pytest

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from research.parallel import MeshConfig, abstract_batch, use_mesh
from research.parallel.zero import MIXED, bytes_per_parameter, check_stage, moved_per_parameter
from research.planning.program import collectives, count
from research.planning.topology import compile_for_tpu, topology_mesh
from research.training import OptimizerConfig, TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import make_step
from tests.research.parallel.test_training import MODEL as MODEL_SOURCE


def test_the_formula_gives_figure_1():
    """7.5 billion parameters on 64 devices: 120, 31.4, 16.6 and 1.9 GB."""
    found = [7.5 * bytes_per_parameter(stage, 64, *MIXED) for stage in range(4)]
    assert found == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    assert [moved_per_parameter(stage, 1024) for stage in (1, 2, 3)] == pytest.approx(
        [2, 2, 3], rel=1e-3
    )


# Bytes, and where everything lies, at 2, 4 and 8 devices of one process.
BYTES = """
import math
import jax
from layers.attention import AttentionConfig
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.parallel import MeshConfig, abstract_batch, make_mesh, use_mesh
from research.parallel.zero import MIXED, bytes_per_parameter
from research.training import TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import finish, make_gradients

# mixed precision as in the paper: 2 bytes a parameter, 2 a gradient, 12 for a float32 copy and the
# two moments
MODEL = DecoderConfig(
    vocab_size=256, width=128, num_layers=2, mlp=MlpConfig(512),
    attention=AttentionConfig(num_heads=4, implementation="reference"),
    param_dtype="bfloat16", dtype="bfloat16",
)
TRAINING = TrainingConfig(steps=3)
optimizer = make_optimizer(TRAINING.optimizer, TRAINING.steps)




def ways_of(tree):
    # of weights: norms lie whole everywhere
    weights = [a for a in jax.tree.leaves(tree) if a.ndim > 2]
    return {math.prod(a.shape) // math.prod(a.sharding.shard_shape(a.shape)) for a in weights}


for ways in (2, 4, 8):
    for stage in (1, 2, 3):
        mesh = make_mesh(MeshConfig(data=1, fsdp=ways, zero=stage), jax.devices()[:ways])
        state = abstract_state(MODEL, optimizer, mesh, stage)
        batch = abstract_batch(mesh, 8, 32)

        def step(state, batch):
            # that of `make_step`, and the gradients as the stage keeps them
            gradients, denominator, _ = of_batch(state.model, batch, jax.random.key(0))
            finished = finish(gradients, denominator, TRAINING)
            return state.apply(finished, optimizer, stage), gradients

        of_batch = make_gradients(TRAINING, stage=stage)
        with use_mesh(mesh):
            compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        analysis = compiled.memory_analysis()
        rows = sum(a.dtype.itemsize * a.size for a in batch.values()) // ways
        held = analysis.argument_size_in_bytes - rows
        # donated: the new state lies where the old one did, and the rest of the output is gradients
        assert analysis.alias_size_in_bytes > 0.99 * held
        held += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        found = held / sum(a.size for a in jax.tree.leaves(state.model))
        want = bytes_per_parameter(stage, ways, *MIXED)
        print(ways, stage, found, want, flush=True)
        assert abs(found / want - 1) < 0.02, (ways, stage, found, want)
        new, kept = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            (state, state.model), compiled.output_shardings,
        )
        lies = [ways_of(tree) for tree in (new.model, kept, new.optimizer)]
        all_of_it, share = {1}, {ways}
        assert lies == [
            share if stage == 3 else all_of_it, share if stage >= 2 else all_of_it, share
        ], (stage, lies)
print("passed")
"""


def test_bytes_a_device_are_the_formula_s(run_script):
    assert run_script(BYTES).endswith("passed\n")


# Losses and parameters of every stage, alone and beside other axes and micro-batches.
TRAJECTORIES = (
    MODEL_SOURCE
    + """
want, reference = curve(MeshConfig(data=1), devices=jax.devices()[:1])
reference = [np.asarray(a) for a in jax.tree.leaves(reference)]
for stage, parts, sizes in (
    (1, 1, dict(fsdp=8)),
    (2, 1, dict(data=2, fsdp=4)),
    (1, 2, dict(fsdp=2, sequence=2, tensor=2)),
    (2, 2, dict(data=2, fsdp=2, tensor=2)),
):
    training = dataclasses.replace(TRAINING, gradient_accumulation=parts)
    got, model = curve(MeshConfig(**{"data": 1, **sizes}, zero=stage), training)
    print(stage, parts, sizes, got, flush=True)
    np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=f"{stage} {sizes}")
    for a, r in zip(jax.tree.leaves(model), reference, strict=True):
        np.testing.assert_allclose(a, r, atol=1e-3)  # as in `test_training`
print("passed")
"""
)


def test_every_stage_trains_as_one_device(run_script):
    assert run_script(TRAJECTORIES).endswith("passed\n")


# Gradients of every kind of layer, at every stage, as far as it can be on a split sequence.
LAYERS = """
import jax, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from research.data import DataConfig, SyntheticConfig, make_dataset
from research.parallel import MeshConfig, make_mesh, shard_batch, shardings, use_mesh, zero
from research.training import TrainingConfig
from research.training.step import finish, make_gradients

RECURRENT = DecoderConfig(
    vocab_size=64, width=32, num_layers=4, mlp=MlpConfig(64), position="none",
    rwkv=RwkvConfig(8, 4, 4, 4, 4), mamba=MambaConfig(4, head_dim=8),
    pattern=("rwkv4", "rwkv7", "mamba", "mamba2"), feed_forward=("rwkv4", "rwkv7", "none", "none"),
)
ATTENDING = DecoderConfig(
    vocab_size=64, width=32, num_layers=2, mlp=MlpConfig(64), moe=MoeConfig(4, 32),
    attention=AttentionConfig(num_heads=4), latent=LatentConfig(4, 16, 8, 8, 8, 16),
    pattern=("attention", "latent"), feed_forward=("mlp", "moe"),
)
DATA = DataConfig(source="synthetic", sequence_length=16, batch_size=16,
                  synthetic=SyntheticConfig(task="copy", vocab_size=64))
batch = next(iter(make_dataset(DATA)))


def found(config, mesh, stage, parts):
    # parameters off their initial values: those of 0 hide what is multiplied by them
    model = jax.jit(lambda: jax.tree.map(lambda a: a + 0.01, Decoder(config, rngs=nnx.Rngs(0))))()
    if mesh.size > 1:
        model = jax.device_put(model, shardings(model, mesh, split=stage == 3))
    training = TrainingConfig(steps=3, gradient_accumulation=parts)
    of_batch = make_gradients(training, stage=stage)

    def finished(model, batch):
        gradients, denominator, _ = of_batch(model, batch, jax.random.key(0))
        return finish(gradients, denominator, training)

    with use_mesh(mesh):
        gradients = jax.jit(finished)(model, shard_batch(batch, mesh))
    return [np.asarray(a) for a in jax.tree.leaves(gradients)]


one = make_mesh(MeshConfig(), jax.devices()[:1])
for config, beside, split in (
    (RECURRENT, dict(tensor=2), dict(sequence=2, tensor=2)),
    (ATTENDING, dict(expert=2), dict(sequence=2, expert=2)),
):
    want = found(config, one, 3, 1)
    for stage, parts, sizes in (
        (1, 2, dict(data=2, fsdp=2, **beside)),
        (2, 1, dict(fsdp=4, **beside)),
        (2 if config is ATTENDING else 3, 2, dict(fsdp=2, **split)),
    ):
        mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
        for a, w in zip(found(config, mesh, stage, parts), want, strict=True):
            atol = 1e-5 * max(1, np.abs(w).max())
            np.testing.assert_allclose(a, w, atol=atol, err_msg=f"{stage} {sizes}")
print("passed")
"""


@pytest.mark.slow
def test_every_kind_of_layer_has_the_gradients_of_one_device(run_script):
    assert run_script(LAYERS).endswith("passed\n")


MODEL = DecoderConfig(
    vocab_size=512,
    width=1024,
    num_layers=2,
    attention=AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=128, implementation="reference"
    ),
    mlp=MlpConfig(width=1024),
    dtype="bfloat16",
    scan=True,
)
LARGE = 2**16  # bytes: norms and sums for metrics are smaller, weights larger
WEIGHTS = 7  # of a layer: q, k, v, out, gate, up, down
PARTS = 4


@pytest.mark.tpu_compile
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_four_tpus_say_to_each_other(stage):
    """Four micro-batches of two layers, by count and volume; ``data`` is stage 0."""
    config = MeshConfig(data=1, fsdp=4, zero=stage) if stage else MeshConfig(data=4)
    mesh = topology_mesh("v5e:2x2", config)
    training = TrainingConfig(steps=10, gradient_accumulation=PARTS)
    optimizer = make_optimizer(training.optimizer, training.steps)
    state = abstract_state(MODEL, optimizer, mesh, config.zero_stage)
    batch = abstract_batch(mesh, 16, 128)
    with use_mesh(mesh):
        text = compile_for_tpu(make_step(training, stage=config.zero_stage), state, batch).as_text()
    found = collectives(text, mesh.size)
    counts = count(found, above=LARGE)
    layers, parameters = MODEL.num_layers, sum(a.size for a in jax.tree.leaves(state.model))
    # nothing is summed for a micro-batch alone, norms included: what is, is summed at the end
    assert not [c for c in found if c.kind == "all-reduce" and c.depth > 0]
    moved = {kind: sum(c.moved for c in found if c.kind == kind) for kind in counts}
    table = MODEL.vocab_size * MODEL.width * 3 / 4  # to three of four devices
    weights = parameters * 3 / 4 - table
    if stage == 0:
        assert counts == {"all-reduce": 1}
        assert moved["all-reduce"] == pytest.approx(8 * (weights + table), rel=0.01)
    elif stage == 1:
        # all gradients once, then the new parameters
        assert counts["all-gather"] == WEIGHTS + 1 >= counts["reduce-scatter"] > 0
        assert moved["all-gather"] == pytest.approx(4 * (weights + table), rel=0.01)
        assert moved["reduce-scatter"] == pytest.approx(4 * (weights + table), rel=0.01)
    elif stage == 2:
        # a layer's gradients in a scatter or more, each time; then the new parameters
        assert counts["all-gather"] == WEIGHTS + 1
        assert PARTS * (layers + 1) <= counts["reduce-scatter"] <= PARTS * (WEIGHTS * layers + 1)
        assert moved["all-gather"] == pytest.approx(4 * (weights + table), rel=0.01)
        assert moved["reduce-scatter"] == pytest.approx(4 * PARTS * (weights + table), rel=0.01)
    else:
        # bfloat16 parameters for each pass of each layer; the table to look up in and for logits
        assert PARTS * 2 * WEIGHTS * layers <= counts["all-gather"]
        assert counts["all-gather"] <= PARTS * 2 * (WEIGHTS * layers + 1)
        gathered = 2 * (2 * PARTS * weights + 1.5 * PARTS * table)
        assert moved["all-gather"] == pytest.approx(gathered, rel=0.1)
        assert PARTS * (layers + 2) <= counts["reduce-scatter"] <= PARTS * (WEIGHTS * layers + 2)
        # the table's gradient of logits is float32
        assert moved["reduce-scatter"] == pytest.approx(PARTS * (2 * weights + 6 * table), rel=0.01)


RECURRENT = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=2,
    mlp=MlpConfig(64),
    rwkv=RwkvConfig(8, 4, 4, 4, 4),
    pattern=("rwkv7",),
    position="none",
)


@pytest.mark.tpu_compile
def test_a_stage_that_changes_nothing_or_cannot_be_is_refused():
    sizes = dict(stage=1, data=1, fsdp=2, expert=1, sequence=2, tensor=1)
    with pytest.raises(ConfigError, match="^zero=4: must be 1, 2 or 3"):
        MeshConfig(zero=4)
    with pytest.raises(ConfigError, match="^mesh.zero=1: changes nothing: mesh.fsdp=1"):
        check_stage(1, MODEL, {**sizes, "fsdp": 1})
    with pytest.raises(ConfigError, match="^mesh.zero=2: must be 3: .* mesh.sequence=2"):
        check_stage(2, RECURRENT, sizes)
    mamba2 = dataclasses.replace(RECURRENT, mamba=MambaConfig(4, head_dim=8), pattern=("mamba2",))
    with pytest.raises(ConfigError, match="^mesh.zero=1: must be 3: .* mesh.sequence=2"):
        check_stage(1, mamba2, sizes)
    check_stage(2, RECURRENT, {**sizes, "sequence": 1})
    check_stage(3, RECURRENT, sizes)
    check_stage(2, MODEL, sizes)
    check_stage(None, MODEL, {**sizes, "fsdp": 1})
    descent = make_optimizer(OptimizerConfig("sgd", b1=0.0), 10)
    mesh = topology_mesh("v5e:2x2", MeshConfig(data=1, fsdp=4, zero=1))
    with pytest.raises(ConfigError, match="^mesh.zero=1: changes nothing: fsdp shards no moment"):
        abstract_state(MODEL, descent, mesh, 1)
