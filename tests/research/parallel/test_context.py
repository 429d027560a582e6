"""Attention over a split sequence: the values and gradients of one device, and what is sent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.context_parallel import sharded_attention, zigzag_order
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from pallas_kernels.flash_attention import attention_gradients, flash_attention
from pallas_kernels.mask import Mask
from research.parallel import MeshConfig, use_mesh, validate
from research.planning.program import collectives
from research.planning.topology import compile_for_tpu, topology_mesh
from tests.research.parallel.test_mesh import _Shape
from tests.research.parallel.test_training import MODEL as MODEL_SOURCE


def test_a_zigzag_deals_both_ends_to_each():
    order = zigzag_order(16, 4)
    assert order.reshape(4, 4).tolist() == [
        [0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9],
    ]  # fmt: skip
    # under a causal mask every device has as many pairs to do
    pairs = [sum(int(t) + 1 for t in row) for row in order.reshape(4, 4)]
    assert len(set(pairs)) == 1


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_through_some_of_the_keys_add_up(implementation):
    """In two halves of the keys, against the gradient through all of them."""
    rng = np.random.default_rng(0)
    b, t, h, k, c = 2, 12, 4, 2, 8
    q, dy = (jnp.asarray(rng.normal(size=(b, t, h, c)), jnp.float32) for _ in range(2))
    keys, values = (jnp.asarray(rng.normal(size=(b, t, k, c)), jnp.float32) for _ in range(2))
    at = jnp.asarray(np.tile(np.r_[0:7, 0:4, -1], (b, 1)), jnp.int32)
    segments = jnp.asarray(np.tile(np.r_[[1] * 7, [2] * 5], (b, 1)), jnp.int32)
    until = jnp.where(at >= 0, at // 3 * 3 + 2, -1)
    mask = Mask.of_tokens(at, segments, until, window=5)
    options = dict(
        soft_cap=3.0, alibi_slopes_h=np.linspace(0.1, 0.4, h).astype(np.float32),
        implementation=implementation,
    )  # fmt: skip

    def run(q, k, v):
        return flash_attention(q, k, v, mask, **options, return_lse=True)

    (y, lse), pull = jax.vjp(run, q, keys, values)
    want = pull((dy, jnp.zeros_like(lse)))
    halves = []
    for part in (slice(0, 6), slice(6, 12)):
        here = mask.with_keys(at[:, part], segments[:, part])
        halves.append(
            attention_gradients(q, keys[:, part], values[:, part], y, lse, dy, here, **options)
        )
    (dq, *first), (more, *second) = halves
    joined = [jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)]
    for a, w in zip((dq + more, *joined), want, strict=True):
        np.testing.assert_allclose(a, w, atol=2e-6)


# The operation on 8 devices, 4 along time: packed segments, grouped heads, windows, padding, ALiBi,
# caps, sinks; values and every gradient.
OPERATION = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from layers.context_parallel import sharded_attention, zigzag_order
from pallas_kernels.mask import Mask
from research.parallel import MeshConfig, make_mesh, use_mesh

rng = np.random.default_rng(0)
b, t, h, k, c = 2, 32, 8, 4, 8
mesh = make_mesh(MeshConfig(data=2, sequence=4))
q, dy = (jnp.asarray(rng.normal(size=(b, t, h, c)), jnp.float32) for _ in range(2))
keys, values = (jnp.asarray(rng.normal(size=(b, t, k, c)), jnp.float32) for _ in range(2))
# three documents and padding in one row, one document in the other
at = np.stack([np.r_[0:11, 0:13, 0:5, [-1] * 3], np.arange(t)]).astype(np.int32)
segments = np.stack([np.r_[[1] * 11, [2] * 13, [3] * 5, [0] * 3], np.ones(t)]).astype(np.int32)
# images of four tokens in the second row
until = np.stack([np.full(t, -1), np.arange(t) // 4 * 4 + 3]).astype(np.int32)
slopes = np.linspace(0.05, 0.4, h).astype(np.float32)
sinks = jnp.asarray(rng.normal(size=h), jnp.float32)


def run(context, static, options, mesh=None):
    order = np.arange(t) if context != "zigzag" else zigzag_order(t, 4)
    back = np.argsort(order)
    place = lambda a: a
    if mesh is not None:
        place = lambda a: jax.device_put(a, NamedSharding(mesh, P("data", "sequence")))
    arrays = [place(a[:, order]) for a in (q, keys, values, dy)]
    limited = [until] if static.pop("limited", False) else []
    where = [place(jnp.asarray(a)[:, order]) for a in (at, segments, *limited)]

    def both(q, k, v, sinks, dy, *where):
        def f(q, k, v, sinks):
            return sharded_attention(
                q, k, v, Mask.of_tokens(*where, **static), context=context,
                **{**options, **({"sinks_h": sinks} if "sinks_h" in options else {})},
            )
        y, pull = jax.vjp(f, q, k, v, sinks)
        return y, pull(dy)

    *qkv, dy_ = arrays
    program = jax.jit(both).lower(*qkv, sinks, dy_, *where).compile()
    y, (dq, dk, dv, d_sinks) = program(*qkv, sinks, dy_, *where)
    return [np.asarray(a)[:, back] for a in (y, dq, dk, dv)] + [np.asarray(d_sinks)], program


for static, options in (
    (dict(window=6), dict(alibi_slopes_h=slopes)),
    (dict(window=10, limited=True), dict(soft_cap=2.0, sinks_h=sinks, implementation="reference")),
    (dict(causal=False, window=19), dict(implementation="reference")),
):
    want, _ = run("gather", dict(static), options)
    for context in ("ring", "zigzag", "ulysses"):
        with use_mesh(mesh):
            got, program = run(context, dict(static), options, mesh)
        for name, a, w in zip(("y", "dq", "dk", "dv", "d_sinks"), got, want, strict=True):
            np.testing.assert_allclose(a, w, atol=1e-5, err_msg=f"{context} {static} {name}")
        text = program.as_text()
        gathers = [line for line in re.findall(r"= (\\S+) all-gather\\(", text)]
        if context == "ulysses":
            assert "all-to-all(" in text
            # positions and segments alone
            assert all(line.startswith("s32[") for line in gathers), gathers
        else:
            assert "collective-permute(" in text and not gathers, gathers
print("passed")
"""


def test_every_way_is_one_device_in_value_and_gradient(run_script):
    assert run_script(OPERATION).endswith("passed\n")


# And whole training runs, packed, with other axes beside.
TRAINING = (
    MODEL_SOURCE
    + """
MODEL = dataclasses.replace(MODEL, attention=AttentionConfig(num_heads=8, num_kv_heads=4),
                            max_length=32, position="learned")
TRAINING = dataclasses.replace(TRAINING, eval_batches=1, steps=2)
want, _ = curve(MeshConfig(data=1), TRAINING, devices=jax.devices()[:1])
plain = MODEL
for context, sizes in (
    ("zigzag", dict(fsdp=2, sequence=4)),
    ("ulysses", dict(fsdp=2, sequence=2, tensor=2)),
):
    attention = dataclasses.replace(plain.attention, context=context)
    MODEL = dataclasses.replace(plain, attention=attention)
    got, _ = curve(MeshConfig(**{"data": 1, **sizes}), TRAINING)
    print(context, got, flush=True)
    np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=context)
print("passed")
"""
)


def test_training_by_every_way_is_training_on_one_device(run_script):
    assert run_script(TRAINING).endswith("passed\n")


@pytest.mark.tpu_compile
def test_four_tpus_pass_keys_round_and_gather_none():
    """Through the TPU's kernels: 3 turns forward, 3 backward and one home."""
    mesh = topology_mesh("v5e:2x2", MeshConfig(data=1, sequence=4))
    place = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    q = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16, sharding=place)
    k = jax.ShapeDtypeStruct((1, 2048, 2, 128), jnp.bfloat16, sharding=place)

    def both(q, k, v, dy):
        run = functools.partial(sharded_attention, mask=Mask(), context="ring")
        y, pull = jax.vjp(run, q, k, v)
        return y, pull(dy)

    with use_mesh(mesh):
        text = compile_for_tpu(jax.jit(both), q, k, k, q).as_text()
    found = collectives(text, 4)
    assert {c.kind for c in found} == {"collective-permute"}
    share = 512 * 2 * 128  # numbers of keys
    sent = {dtype: 0.0 for dtype in ("bf16", "f32")}
    for one in found:
        (dtype,) = {shape.split("[")[0] for shape in one.shapes}
        if dtype in sent:
            sent[dtype] += one.moved
    # keys and values forward and backward; their gradients, which go home when they are summed
    assert sent["bf16"] == 2 * share * 2 * (3 + 3 + 1)
    assert sent["f32"] == 4 * share * 2 * 3
    assert "tpu_custom_call" in text


ATTENDING = DecoderConfig(
    vocab_size=64, width=32, num_layers=2, attention=AttentionConfig(8, 4), mlp=MlpConfig(64)
)


@pytest.mark.parametrize(
    "context, options, sizes, message",
    [
        ("rink", {}, {}, "context='rink': must be one of gather, ring, .*did you mean 'ring'"),
        ("ring", {}, {}, "attention.context='ring': changes nothing: mesh.sequence=1"),
        (
            "ulysses", {}, dict(sequence=4, tensor=2),
            "attention.num_kv_heads=4: must be a multiple of mesh.sequence×tensor=8",
        ),
        (
            "zigzag", {}, dict(sequence=16),
            "sequence_length=16: must be a multiple of 2 × mesh.sequence=32",
        ),
        (
            "zigzag",
            dict(pattern=("attention", "rwkv7"), rwkv=RwkvConfig(8, 4, 4, 4, 4)),
            dict(sequence=2),
            "pattern=.*: must be attention only for context=zigzag",
        ),
        (
            "zigzag",
            dict(feed_forward=("moe",), moe=MoeConfig(4, 16, capacity_factor=1.0)),
            dict(sequence=2),
            "moe.capacity_factor=1.0: must be None for context=zigzag",
        ),
        (
            "ring",
            dict(pattern=("rwkv7",), rwkv=RwkvConfig(8, 4, 4, 4, 4), position="none"),
            dict(sequence=2),
            "attention.context='ring': changes nothing: the pattern has no attention",
        ),
    ],
)  # fmt: skip
def test_a_context_that_changes_nothing_or_cannot_be_is_refused(context, options, sizes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        attention = dataclasses.replace(ATTENDING.attention, context=context)
        model = dataclasses.replace(ATTENDING, attention=attention, **options)
        validate(model, _Shape(**sizes), batch_size=8, sequence_length=16)
