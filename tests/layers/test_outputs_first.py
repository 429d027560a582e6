"""Weights that are transposed in memory for decoding on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.outputs_first import OutputsFirst, for_decoding, outputs_first
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from layers.weights import dense, flat

BIASED = AttentionConfig(4, 2, qkv_bias=True)
# fields of the model, and parts of the names of weights that stay as they are
CASES = {
    "tied": (dict(attention=BIASED), []),
    "untied": (dict(attention=BIASED, tie_embeddings=False), []),
    "recurrent": (
        dict(pattern=("mamba", "mamba2", "rwkv7"), num_layers=3, position="none",
             mamba=MambaConfig(state=3, head_dim=8), rwkv=RwkvConfig(head_dim=8)), []
    ),
    "experts": (dict(attention=BIASED, feed_forward=("moe",), moe=MoeConfig(2, 12)), ["mlp"]),
    "latent": (
        dict(pattern=("latent",), latent=LatentConfig(4, 6, head_dim=4, rotary_dim=2, value_dim=3)),
        ["mixer/key", "mixer/value"],
    ),
}  # fmt: skip
TOKENS = jnp.arange(10).reshape(2, 5)


def make(fields):
    config = DecoderConfig(**(dict(vocab_size=16, width=16, num_layers=1) | fields),
                           mlp=MlpConfig(24), scan=False)  # fmt: skip
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("name", CASES)
def test_same_function_with_every_matrix_transposed(name):
    fields, kept = CASES[name]
    model = make(fields)
    changed = outputs_first(model)
    run = jax.jit(lambda model: model(TOKENS).logits_btv)
    np.testing.assert_allclose(run(changed), run(model), atol=2e-6)

    before, after = flat(model), flat(changed)
    roles = {
        path: param.get_metadata().get("role")
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    matrices = {"/".join(map(str, path)) for path, role in roles.items() if role is not None}
    transposed = {path.removesuffix("/array") for path in after} - set(after)
    assert transposed
    assert all(any(part in path for part in kept) for path in matrices - transposed)
    assert not any(part in path for part in kept for path in transposed if "router" not in path)
    back = flat(dense(changed, jnp.float32))
    for path, array in before.items():
        np.testing.assert_array_equal(back[path], array, path)


def test_weights_are_contiguous_as_the_product_reads_them():
    model = outputs_first(make(CASES["untied"][0]))
    query = model.blocks[0].mixer.query.weight.get_value()
    assert isinstance(query, OutputsFirst) and query.array.shape == (4, 4, 16)  # h, c, d
    assert query.parts() == {"array": ("heads", "head_dim", "embed")}
    head = model.head.weight.get_value()
    assert head.array.shape == (16, 16)
    table = model.embedding.table.get_value()
    assert table.order == (0, 1)  # rows are looked up; channels are summed for logits


def test_products_in_bfloat16_with_float32_results():
    model = make(dict(attention=BIASED, dtype="bfloat16"))
    logits = [m(TOKENS).logits_btv for m in (model, outputs_first(model))]
    assert all(a.dtype == jnp.float32 for a in logits)
    np.testing.assert_allclose(*logits, atol=0.02)


def test_weights_stay_under_the_rules_of_a_mesh_and_the_second_time():
    model = make(CASES["tied"][0])
    with logical_axis_rules([("heads", "tensor")]):
        kept = for_decoding(model)
    assert not [path for path in flat(kept) if path.endswith("/array")]
    once = for_decoding(model)
    assert [path for path in flat(once) if path.endswith("/array")]
    assert all(
        a is b for a, b in zip(*map(jax.tree.leaves, (once, for_decoding(once))), strict=True)
    )
