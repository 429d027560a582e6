"""Experts split over devices: tokens travel by all-to-all, and nothing else changes."""

SCRIPT = """
import dataclasses
import jax, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.routing import MoeConfig
from research.data import DataConfig, SyntheticConfig, make_dataset
from research.parallel import MeshConfig, make_mesh, shard_batch, shardings, use_mesh, validate
from research.training import OptimizerConfig, TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import make_step

MOE = MoeConfig(4, 16, balance_weight=0.1, z_weight=0.01, shared_experts=1)
MODEL = DecoderConfig(
    vocab_size=64, width=32, num_layers=2, attention=AttentionConfig(4), moe=MOE,
    feed_forward=("moe",),
)
DATA = DataConfig(source="synthetic", sequence_length=32, batch_size=8,
                  synthetic=SyntheticConfig(task="copy", vocab_size=64))
# plain gradient descent at rate 1: the change of a weight is its gradient
DESCENT = OptimizerConfig("sgd", 1.0, "constant", b1=0.0, weight_decay=0.0, clip_norm=None)
TRAINING = TrainingConfig(steps=2, optimizer=DESCENT)
batch = next(iter(make_dataset(DATA)))
batch["segment_ids"] = np.repeat([[1, 2, 3]], [7, 16, 9], axis=1) + np.zeros((8, 1), np.int32)
KINDS = {
    "dropless": dict(router="sigmoid", bias_rate=0.01),
    "capacity": dict(router="softmax", capacity_factor=0.8, capacity_group="row"),
    "capacity of segments": dict(router="softmax", capacity_factor=0.8),
    "experts choose": dict(
        router="expert_choice", capacity_factor=0.4, capacity_group="row", balance_weight=0.0
    ),
}


def found(options, mesh):
    config = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, **options))
    validate(config, mesh, batch_size=8, sequence_length=32)
    optimizer = make_optimizer(TRAINING.optimizer, TRAINING.steps)
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    state = TrainState.begin(model, optimizer, 0)
    with use_mesh(mesh):
        if mesh.size > 1:
            state = jax.device_put(state, shardings(state, mesh))
        sharded = shard_batch(batch, mesh)
        step = make_step(TRAINING)
        text = step.lower(state, sharded).compile().as_text()
        state, metrics = step(state, sharded)
    for a, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings(state, mesh))):
        assert mesh.size == 1 or a.sharding.is_equivalent_to(s, a.ndim), (a.sharding, s)
    up = state.model.mixtures[0].up[...]
    share = tuple(up.sharding.shard_shape(up.shape))
    return [np.asarray(a) for a in jax.tree.leaves((state.model, metrics))], metrics, share, text


for kind, options in KINDS.items():
    want, metrics, _, _ = found(options, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert (metrics["router_drop_rate"] > 0.05) == (kind != "dropless"), (kind, metrics)
    meshes = [(dict(data=1, fsdp=2, expert=2, sequence=2), (2, 2, 16, 16))]
    if kind in ("dropless", "experts choose"):
        meshes.append((dict(data=1, expert=4, tensor=2), (2, 1, 32, 8)))
    for sizes, share in meshes:
        got, _, held, text = found(options, make_mesh(MeshConfig(**sizes)))
        assert held == share, (sizes, held)
        assert "all-to-all" in text, sizes
        for a, b in zip(got, want, strict=True):
            limit = 2e-5 * max(1, np.abs(b).max())
            np.testing.assert_allclose(a, b, atol=limit, err_msg=f"{kind} {sizes}")


try:
    validate(MODEL, make_mesh(MeshConfig(data=1, expert=8)), batch_size=8, sequence_length=32)
except ConfigError as error:
    assert str(error) == "moe.num_experts=4: must be a multiple of mesh.expert=8", error
else:
    raise AssertionError("4 experts over 8 devices")
print("passed")
"""


def test_any_split_of_the_experts_is_one_device(run_script):
    assert run_script(SCRIPT).endswith("passed\n")
