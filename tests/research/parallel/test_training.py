"""Training on every mesh of eight devices, and by two processes, is training on one device."""

import os
import socket
import subprocess
import sys

from tests.conftest import environment

MODEL = """
import itertools, math, sys
import jax, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.parallel import MeshConfig, initialize, make_mesh, shard_batch, shardings, use_mesh
from research.training import OptimizerConfig, TrainingConfig, load_model, train
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import make_step, next_token_loss

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
one = MeshConfig(data=1)
single = jax.devices()[:1]
make = make_mesh
import research.training.loop as loop
loop.make_mesh = lambda config, devices=None: make(config, single)
want, reference = curve(one)
loop.make_mesh = make
reference = [np.asarray(a) for a in jax.tree.leaves(reference)]
assert want[0] > want[2], want

shapes = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8]
assert len(shapes) == 20
import dataclasses
accumulated = dataclasses.replace(TRAINING, gradient_accumulation=2)
for data, fsdp, sequence, tensor in shapes:
    config = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    runs = [TRAINING]
    if (data, fsdp) in ((2, 2), (1, 4), (1, 1)):
        runs.append(accumulated)
    for training in runs:
        got, model = curve(config, training)
        print(config, training.gradient_accumulation, got, flush=True)
        np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=str(config))
        placed = jax.tree.leaves(shardings(model, make(config)))
        for a, s, r in zip(jax.tree.leaves(model), placed, reference, strict=True):
            assert a.sharding.is_equivalent_to(s, a.ndim), (config, a.sharding, s)
            # Adam divides by the root of a small second moment: 1e-2 is its step
            np.testing.assert_allclose(a, r, atol=1e-3)
print("passed")
"""
)


def test_every_mesh_of_eight_devices_trains_alike(run_script):
    assert run_script(ALL_MESHES).endswith("passed\n")
