"""Caches on meshes of eight devices: prefill and decode give the logits of one device."""

SCRIPT = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.state import CONTIGUOUS, CacheConfig, cleared, rewind
from research.parallel import MeshConfig, make_mesh, shardings, use_mesh
from research.parallel.rules import abstract_batch

MODEL = DecoderConfig(
    vocab_size=64, width=32, num_layers=4, mlp=MlpConfig(64),
    attention=AttentionConfig(4, 2, window=6), pattern=("attention", "sliding"),
)
tokens = np.random.default_rng(0).integers(0, 64, (8, 20)).astype(np.int32)


def logits(mesh, cache=CacheConfig()):
    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
    rows = next(iter(abstract_batch(mesh, 8, 1).values())).sharding
    if mesh.size > 1:
        model = jax.device_put(model, shardings(model, mesh))
    with use_mesh(mesh):
        state = jax.jit(lambda: cleared(model.init_state(8, 20, cache)))()
        step = jax.jit(lambda m, x, at, s: m(x, at, state=s)[:2])
        found, start = [], 0
        for size in (9, 1, 1, 7, 1, 1):  # the window rolls over
            at = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (8, size))
            x, at = (jax.device_put(a, rows) for a in (tokens[:, start:start + size], at))
            out, state = step(model, x, at, state)
            found.append(np.asarray(out))
            start += size
        if cache.kind == "paged":  # a token is taken back, and read again
            state = jax.jit(lambda s: rewind(s, jnp.ones(8, jnp.int32)))(state)
            out, state = step(model, x, at, state)
            found.append(np.asarray(out))
    held = state[0].mixer.keys.codes
    return np.concatenate(found, axis=1), tuple(held.sharding.shard_shape(held.shape))


PAGES = CacheConfig("paged", page=4)
for dtype, cases in (
    (None, [
        (dict(data=2, fsdp=2, tensor=2), CONTIGUOUS, (2, 2, 1, 20, 8)),
        (dict(data=1, fsdp=8), CONTIGUOUS, (2, 1, 2, 20, 8)),
        (dict(data=4, fsdp=1, tensor=2), PAGES, (2, 40, 1, 4, 8)),  # each device has all pages
    ]),
    ("int4", [
        (dict(data=4, fsdp=1, tensor=2), CONTIGUOUS, (2, 2, 1, 20, 4)),
        (dict(data=1, fsdp=4, tensor=2), PAGES, (2, 40, 1, 4, 4)),
    ]),
):
    want, _ = logits(make_mesh(MeshConfig(), jax.devices()[:1]), CacheConfig(dtype=dtype))
    for sizes, cache, share in cases:
        got, held = logits(make_mesh(MeshConfig(**sizes)), dataclasses.replace(cache, dtype=dtype))
        assert held == share, (sizes, held)
        name = f"{sizes} {cache.kind} {dtype}"
        np.testing.assert_allclose(got[:, :20], want, atol=2e-5, err_msg=name)
        if cache.kind == "paged":
            np.testing.assert_allclose(got[:, 20:], got[:, 19:20], atol=2e-5, err_msg=name)
print("passed")
"""


def test_decoding_on_a_mesh_is_decoding_on_one_device(run_script):
    assert run_script(SCRIPT).endswith("passed\n")
