"""Parameters that hold a leaf in place of an array, through all that is done to parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.latent_attention import LatentConfig
from layers.linear import Linear
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from layers.weights import Leaf, dense, einsum, flat, lookup, map_named, read
from research.models import load, save
from research.training.checkpoint import Checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Leaf):
    """``weight · scale``, a scale for each index of the last dimension."""

    weight: jax.Array
    scale: jax.Array
    axes: tuple = dataclasses.field(metadata=dict(static=True))

    def parts(self):
        return {"weight": self.axes, "scale": self.axes[-1:]}

    def dense(self, dtype):
        return (self.weight * self.scale).astype(dtype)


def scaled(tree, least=2):
    """``tree`` with a `Scaled` of the same value in place of arrays of ``least`` dimensions."""

    def of(array, axes):
        if len(axes) < least:
            return array
        size = array.shape[-1]
        scale = jnp.linspace(0.5, 2.0, size).astype(array.dtype)
        leading = array.shape[: array.ndim - len(axes)]
        return Scaled(array / scale, jnp.broadcast_to(scale, (*leading, size)), axes)

    return map_named(of, tree)


ATTENTION = AttentionConfig(4, 2, qk_norm=True, qkv_bias=True, sinks=True)
STACKS = {
    "attention": dict(pattern=("attention",), attention=ATTENTION, tie_embeddings=False),
    "experts": dict(
        pattern=("attention",), attention=ATTENTION, feed_forward=("moe",),
        moe=MoeConfig(4, 12, shared_experts=1),
    ),
    "capacity": dict(
        pattern=("attention",), attention=ATTENTION, feed_forward=("moe",),
        moe=MoeConfig(4, 12, capacity_factor=1.0),
    ),
    "latent": dict(
        pattern=("latent",), latent=LatentConfig(4, rank=6, head_dim=4, rotary_dim=2, value_dim=3)
    ),
    "mamba": dict(pattern=("mamba", "mamba2"), feed_forward=("none",), position="none",
                  mamba=MambaConfig(state=3, head_dim=8)),
    "rwkv": dict(
        pattern=("rwkv4", "rwkv7"), feed_forward=("rwkv4", "rwkv7"), position="none",
        rwkv=RwkvConfig(8, 3, 3, 3, 3),
    ),
}  # fmt: skip
TOKENS = jnp.array([[1, 5, 3, 2], [4, 4, 0, 6], [7, 0, 0, 1], [2, 3, 6, 5]])


@functools.cache
def make(name, scan=True):
    options = {"scan": scan, **STACKS[name]}
    config = DecoderConfig(8, 16, 2 * len(options["pattern"]), mlp=MlpConfig(24), **options)
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@jax.jit
def value_and_gradient(model):
    def loss(model):
        logits = model(TOKENS).logits_btv
        return jnp.sum(jnp.sin(logits)), logits

    return jax.value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize(
    ("name", "scan"), [*((name, True) for name in STACKS), ("attention", False)]
)
def test_a_stack_of_leaves_is_the_stack(name, scan):
    """Every weight, table and expert is one; the gradients are its parts'."""
    plain = make(name, scan)
    (_, want), gradients = value_and_gradient(plain)
    model = scaled(plain)
    (_, got), found = value_and_gradient(model)
    np.testing.assert_allclose(got, want, atol=1e-5)
    found, leaves = flat(found), flat(model)
    names = [path.removesuffix("/scale") for path in leaves if path.endswith("/scale")]
    replaced = [path for path in names if f"{path}/weight" in leaves]
    assert len(replaced) > 5 and all(path in flat(plain) for path in replaced)
    for path in replaced:
        whole, scale = flat(gradients)[path], leaves[f"{path}/scale"]
        weight = leaves[f"{path}/weight"]
        # of weight · scale
        stretched = scale.reshape(*scale.shape[:-1], *[1] * (whole.ndim - scale.ndim), -1)
        over = tuple(range(scale.ndim - 1, whole.ndim - 1))
        for part, want in (
            ("weight", whole * stretched),
            ("scale", jnp.sum(whole * weight, over)),
        ):
            got = found[f"{path}/{part}"]
            np.testing.assert_allclose(got, want, atol=2e-5 * max(5, np.abs(want).max()))


def test_cached_decoding():
    plain = make("latent")
    model = scaled(plain)

    @jax.jit
    def last(model):
        state = model.init_state(4, 4)
        for t in range(4):
            at = jnp.full((4, 1), t, jnp.int32)
            out = model(TOKENS[:, t : t + 1], at, state=state)
            state = out.state
        return out.logits_btv

    np.testing.assert_allclose(last(model), last(plain), atol=1e-5)


def test_split_merge_and_dense():
    model = scaled(make("attention"))
    graph, state = nnx.split(model)
    again = nnx.merge(graph, state)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    whole = dense(model, jnp.float32)
    assert jax.tree.structure(whole) == jax.tree.structure(make("attention"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(make("attention")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_checkpoints_keep_the_parts(tmp_path):
    model = scaled(make("attention"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, {"model": model}, {}, None)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), model
    )
    (restored, _) = checkpoints.restore(lambda position: {"model": abstract})
    checkpoints.close()
    assert jax.tree.structure(restored["model"]) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, restored["model"], model)


def test_exported_they_are_what_they_stand_for(tmp_path):
    config = DecoderConfig(8, 16, 2, attention=AttentionConfig(4, 2), mlp=MlpConfig(24))
    plain = Decoder(config, rngs=nnx.Rngs(0))
    save(scaled(plain), tmp_path / "exported", "llama")
    again = load(tmp_path / "exported")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_verbs_in_their_dtypes(rngs):
    layer = Linear("btd,df->btf", (4, 6), ("embed", "mlp"), (None,) * 3, rngs=rngs)
    leaf, x = scaled(layer).weight, jnp.ones((1, 2, 4))
    plain = layer.weight
    assert read(plain, jnp.bfloat16).dtype == jnp.bfloat16
    assert read(leaf, jnp.bfloat16).dtype == jnp.bfloat16
    options = dict(dtype=jnp.float32, out_axes=(None,) * 3)
    np.testing.assert_allclose(
        einsum("btd,df->btf", x, leaf, **options),
        einsum("btd,df->btf", x, plain, **options),
        rtol=1e-6,
    )
    ids = jnp.array([[3, 0]])
    np.testing.assert_allclose(
        lookup(leaf, ids, jnp.float32), lookup(plain, ids, jnp.float32), rtol=1e-6
    )
    assert np.isnan(lookup(leaf, jnp.array([[4]]), jnp.float32)).all()


# On meshes of 8 devices: parts are stored as their own axes say, and the numbers are one device's.
SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from layers.decoder import Decoder
from research.parallel import MeshConfig, make_mesh, shardings, use_mesh
from tests.layers.test_weights import make, scaled, value_and_gradient

for name, sizes in (
    ("attention", dict(data=1, fsdp=2, tensor=2, sequence=2)),
    ("experts", dict(data=1, fsdp=2, expert=2, tensor=2)),
):
    model = scaled(make(name))
    (want, logits), gradients = value_and_gradient(model)
    mesh = make_mesh(MeshConfig(**sizes))
    placed = jax.device_put(model, shardings(model, mesh))
    up = placed.blocks[0].mixer.out.weight.get_value()
    assert up.scale.sharding.spec == P(None, "fsdp"), up.scale.sharding
    with use_mesh(mesh):
        (got, sharded), found = value_and_gradient(placed)
    np.testing.assert_allclose(sharded, logits, atol=2e-5, err_msg=name)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3, err_msg=f"{name} {path}")
print("passed")
"""


def test_a_mesh_of_eight_devices(run_script):
    assert run_script(SHARDED).endswith("passed\n")
