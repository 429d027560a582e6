"""Muon's matrices and its updates against float64, for layers in any layout and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.routing import MoeConfig
from layers.stack import rearranged
from layers.weights import flat
from research.training import OptimizerConfig
from research.training.optimizers import make_optimizer

MODEL = DecoderConfig(
    vocab_size=16,
    width=8,
    num_layers=6,
    pattern=("attention", "latent", "mamba"),
    feed_forward=("none", "moe", "none"),
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, qkv_bias=True),
    latent=LatentConfig(2, rank=4, head_dim=4, rotary_dim=2, value_dim=4, query_rank=4),
    mamba=MambaConfig(state=2),
    moe=MoeConfig(2, 12),
    tie_embeddings=False,
)
RATE, DECAY = 0.1, 0.3
CONFIG = OptimizerConfig(
    "muon", learning_rate=RATE, schedule="constant", weight_decay=DECAY, clip_norm=None
)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()


def gradients_like(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), model)


def updates(model, gradients, config=CONFIG):
    optimizer = make_optimizer(config, 9)
    return jax.jit(lambda g, m: optimizer.update(g, optimizer.init(m), m)[0])(gradients, model)


def newton_schulz(g):
    """Five iterations of Jordan's quintic polynomial, in float64, on the shorter side."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def matrices(name, a):
    """The matrices in the parameter ``name``, as views ``[inputs, outputs]`` of ``a``."""
    *_, layer, last = name.split("/")
    if layer == "mlp":
        return [expert for layer in a for expert in layer]
    heads = {"query", "key", "value", "query_up"}
    if layer in heads:
        return [layer.reshape(layer.shape[0], -1) for layer in a]
    if layer == "out":
        return [layer.reshape(-1, layer.shape[-1]) for layer in a]
    return list(a)


def is_map(name):
    return name.startswith("blocks") and (
        name.endswith(("mlp/gate", "mlp/up", "mlp/down"))
        or (name.endswith("weight") and "convolution" not in name)
    )


def test_each_matrix_is_orthogonalised_alone(model):
    gradients = gradients_like(model)
    found, start = flat(updates(model, gradients)), flat(model)
    for name, gradient in flat(gradients).items():
        weight, update = (np.asarray(a, np.float64) for a in (start[name], found[name]))
        if not is_map(name):
            decayed = name in ("embedding/table", "head/weight")
            first = np.sign(gradient) * (1 + 0.9 / 1.9)  # Adam's first step, with Nesterov's term
            want = -RATE * (first + decayed * DECAY * weight)
            np.testing.assert_allclose(update, want, rtol=1e-4, atol=1e-6, err_msg=name)
            continue
        parts = (matrices(name, np.asarray(a, np.float64)) for a in (gradient, weight, update))
        for g, w, u in zip(*parts, strict=True):
            size = 0.2 * np.sqrt(max(g.shape))
            want = -RATE * (size * newton_schulz(g) + DECAY * w)
            np.testing.assert_allclose(u, want, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_stacked_layers_have_the_updates_of_a_list(model, name):
    config = dataclasses.replace(CONFIG, name=name)
    gradients = gradients_like(model)
    stacked = rearranged(updates(model, gradients, config), scan=False)
    listed = updates(*(rearranged(tree, scan=False) for tree in (model, gradients)), config)
    for path, a in flat(stacked).items():
        np.testing.assert_allclose(a, flat(listed)[path], rtol=1e-4, atol=1e-6, err_msg=path)


MESH = """
import dataclasses, sys
import jax, numpy as np
from research.parallel import MeshConfig, make_mesh, shardings, use_mesh
from flax import nnx
from layers.decoder import Decoder
from layers.weights import flat
from tests.research.training.test_muon import CONFIG, MODEL, gradients_like, updates

model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
gradients = gradients_like(model)
mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
for name in ("muon", "adafactor"):
    config = dataclasses.replace(CONFIG, name=name)
    want = flat(updates(model, gradients, config))
    with use_mesh(mesh):
        sharded = [jax.device_put(tree, shardings(tree, mesh)) for tree in (model, gradients)]
        found = flat(updates(*sharded, config))
    for path, a in found.items():
        np.testing.assert_allclose(a, want[path], rtol=1e-4, atol=1e-6, err_msg=path)
print("passed")
"""


def test_a_mesh_changes_no_update(run_script):
    assert run_script(MESH).endswith("passed\n")
