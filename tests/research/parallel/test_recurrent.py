"""Recurrent layers on meshes of eight devices: the loss and gradients of one device."""

SCRIPT = """
import dataclasses
import jax, numpy as np
from flax import nnx
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from research.data import DataConfig, SyntheticConfig, make_dataset
from research.parallel import MeshConfig, make_mesh, shard_batch, shardings, use_mesh, validate
from research.training.objectives import NextToken

MODEL = DecoderConfig(
    vocab_size=64, width=32, num_layers=4, mlp=MlpConfig(64), position="none",
    rwkv=RwkvConfig(8, 4, 4, 4, 4), mamba=MambaConfig(4, head_dim=8),
    pattern=("rwkv4", "rwkv7", "mamba", "mamba2"), feed_forward=("rwkv4", "rwkv7", "none", "none"),
)
# heads of several groups, which lie where their heads do; of one above, which is everybody's
GROUPS = dataclasses.replace(
    MODEL, num_layers=1, mamba=MambaConfig(4, head_dim=8, groups=4), pattern=("mamba2",),
    feed_forward=("none",), mlp=None,
)
DATA = DataConfig(source="synthetic", sequence_length=32, batch_size=8,
                  synthetic=SyntheticConfig(task="copy", vocab_size=64))
batch = next(iter(make_dataset(DATA)))


def found(mesh, config):
    validate(config, mesh, batch_size=8, sequence_length=32)
    model = jax.jit(lambda: jax.tree.map(lambda a: a + 0.01, Decoder(config, rngs=nnx.Rngs(0))))()
    if mesh.size > 1:
        model = jax.device_put(model, shardings(model, mesh))
    with use_mesh(mesh):
        value = jax.jit(jax.value_and_grad(lambda m, b: NextToken()(m, b).total / 256))
        loss, gradients = value(model, shard_batch(batch, mesh))
    rests = jax.tree.leaves(shardings(gradients, mesh))
    for a, s in zip(jax.tree.leaves(gradients), rests, strict=True):
        assert mesh.size == 1 or a.sharding.is_equivalent_to(s, a.ndim), (a.sharding, s)
    return [np.asarray(a) for a in jax.tree.leaves((loss, gradients))]


split = dict(data=1, fsdp=2, tensor=4)
for config, meshes in (
    (MODEL, (split, dict(data=2, sequence=2, tensor=2))),
    (GROUPS, (split,)),
):
    want = found(make_mesh(MeshConfig(), jax.devices()[:1]), config)
    for sizes in meshes:
        for a, b in zip(found(make_mesh(MeshConfig(**sizes)), config), want, strict=True):
            atol = 2e-5 * max(1, np.abs(b).max())
            np.testing.assert_allclose(a, b, atol=atol, err_msg=str(sizes))
for config, message in (
    (MODEL, "width / rwkv.head_dim=4: must be a multiple of mesh.tensor=8"),
    (GROUPS, "mamba.groups=4: must be a multiple of mesh.tensor=8"),
):
    try:
        validate(config, make_mesh(MeshConfig(data=1, tensor=8)), batch_size=8, sequence_length=32)
    except ConfigError as error:
        assert str(error) == message, error
    else:
        raise AssertionError(message)
print("passed")
"""


def test_meshes_of_eight_devices_agree_with_one(run_script):
    assert run_script(SCRIPT).endswith("passed\n")
