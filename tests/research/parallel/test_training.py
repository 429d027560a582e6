"""Training on every mesh of eight devices, and by two processes, is training on one device."""

import pytest

MODEL = """
import dataclasses, itertools, math
import jax, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig, make_dataset
from research.parallel import MeshConfig, initialize, make_mesh, shard_batch, shardings, use_mesh
from research.training import OptimizerConfig, TrainingConfig, load_model, train
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.objectives import NextToken
from research.training.step import make_step

MODEL = DecoderConfig(
    vocab_size=64, width=32, num_layers=2, attention=AttentionConfig(num_heads=8),
    mlp=MlpConfig(64), tie_embeddings=False,
)
DATA = DataConfig(source="synthetic", sequence_length=32, batch_size=8,
                  synthetic=SyntheticConfig(task="copy", vocab_size=64))
TRAINING = TrainingConfig(steps=3, eval_batches=0, z_loss=1e-3,
                          optimizer=OptimizerConfig(learning_rate=1e-2))


def quiet(step, steps, metrics):
    pass


def curve(mesh, training=TRAINING, **options):
    seen = []
    result = train(MODEL, DATA, training, mesh=mesh, **options,
                   progress=lambda step, steps, metrics: seen.append(metrics["loss"]))
    # the callback of step n > 1 shows step n - 1
    return [*seen[1:], result.metrics["loss"], result.metrics["gradient_norm"]], result.model
"""

ALL_MESHES = (
    MODEL
    + """
try:
    train(MODEL, DATA, TRAINING, mesh=MeshConfig(data=1, tensor=3))
except ConfigError as error:
    assert str(error) == "mesh=tensor=3: requires 3 devices, there are 8", error
else:
    raise AssertionError("3 devices of 8")

want, reference = curve(MeshConfig(data=1), devices=jax.devices()[:1])
reference = [np.asarray(a) for a in jax.tree.leaves(reference)]
OTHER_SIZES = [s for s in itertools.product((1, 2, 4), repeat=4)
               if math.prod(s) == 8 and 4 in s and s.index(4) < s.index(2)]
assert len(OTHER_SIZES) == 6
assert want[2] < want[0], want
optimizer = make_optimizer(TRAINING.optimizer, TRAINING.steps)


def rests(tree, mesh):
    for a, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh)), strict=True):
        assert a.sharding.is_equivalent_to(s, a.ndim), (mesh, a.sharding, s)


def state_rests(model, mesh):
    batch = shard_batch(next(iter(make_dataset(DATA))), mesh)
    with use_mesh(mesh):
        rests(jax.jit(jax.grad(lambda m: NextToken()(m, batch).total))(model), mesh)
        state = TrainState.begin(model, optimizer, 0)
        state = jax.device_put(state, shardings(state, mesh))
        for _ in range(2):
            state, _ = make_step(TRAINING)(state, batch)
            rests(state, mesh)
    # they are split, not merely placed: a quarter of the moments of the largest matrix
    split = state.model.blocks[0].mlp.up.weight
    assert split.sharding.shard_shape(split.shape)[-2:] == (16, 32), split.sharding


shapes = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8]
assert len(shapes) == 20
# every set of axes once; their other sizes are among the slow tests
shapes.sort(key=lambda s: s in OTHER_SIZES)
for data, fsdp, sequence, tensor in shapes[PART]:
    config = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    runs = [TRAINING]
    if (data, fsdp, sequence, tensor) in ((2, 2, 1, 2), (1, 2, 2, 2), (1, 2, 4, 1)):
        runs.append(dataclasses.replace(TRAINING, gradient_accumulation=2))
    for training in runs:
        got, model = curve(config, training)
        print(config, training.gradient_accumulation, got, flush=True)
        np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=str(config))
        rests(model, make_mesh(config))
        for a, r in zip(jax.tree.leaves(model), reference, strict=True):
            # Adam divides by the root of a small second moment, and its steps are 1e-2
            np.testing.assert_allclose(a, r, atol=1e-3)
    if len(runs) == 2 and (fsdp, tensor) == (2, 2):
        state_rests(model, make_mesh(config))
print("passed")
"""
)


@pytest.mark.parametrize(
    "part", [":7", *(pytest.param(part, marks=pytest.mark.slow) for part in ("7:14", "14:"))]
)
def test_every_mesh_of_eight_devices_trains_alike(run_script, part):
    assert run_script(ALL_MESHES.replace("PART", part)).endswith("passed\n")
