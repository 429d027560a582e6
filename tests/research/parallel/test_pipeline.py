"""Layers split over stages: losses, gradients and steps are those of one device."""

import dataclasses

import pytest

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.pipeline import idle
from research.parallel import MeshConfig
from research.planning.plan import plan
from research.planning.step import Setup, check_setup
from research.training import TrainingConfig
from tests.research.parallel.test_training import MODEL as TRAINING

GRADIENTS = """
import dataclasses
import jax, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.weights import flat
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from research.data import DataConfig, SyntheticConfig, make_dataset
from research.parallel import MeshConfig, make_mesh, shard_batch, shardings, use_mesh, validate
from research.training.objectives import NextToken

PLAIN = DecoderConfig(
    vocab_size=64, width=32, num_layers=4, attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MlpConfig(64),
)
RING = dataclasses.replace(PLAIN, attention=AttentionConfig(4, context="zigzag"))
# of recurrent layers, the values that RWKV-7 hands from layer to layer go round too
MIXED = DecoderConfig(
    vocab_size=64, width=32, num_layers=8, mlp=MlpConfig(64), position="none",
    rwkv=RwkvConfig(8, 4, 4, 4, 4), mamba=MambaConfig(4), pattern=("rwkv7", "mamba"),
    feed_forward=("rwkv7", "none"),
)
EXPERTS = dataclasses.replace(
    PLAIN, mlp=None, feed_forward=("moe",), moe=MoeConfig(4, 16, balance_weight=0.0)
)
DATA = DataConfig(source="synthetic", sequence_length=32, batch_size=16,
                  synthetic=SyntheticConfig(task="copy", vocab_size=64))
batch = next(iter(make_dataset(DATA)))


def found(mesh, config):
    validate(config, mesh, batch_size=16, sequence_length=32)
    model = jax.jit(lambda: jax.tree.map(lambda a: a + 0.01, Decoder(config, rngs=nnx.Rngs(0))))()
    if mesh.size > 1:
        model = jax.device_put(model, shardings(model, mesh))
        up = flat(model)["blocks/0/mixer_norm/scale"]
        layers = config.repeats // config.circuits
        assert up.shape[0] == layers
        assert up.sharding.shard_shape(up.shape)[0] == layers // mesh.shape["stage"]
    with use_mesh(mesh):
        objective = NextToken(1e-3)

        def loss_and_sums(model, batch):
            found = objective(model, batch)
            return found.total / 512, found.reported

        value = jax.jit(jax.value_and_grad(loss_and_sums, has_aux=True))
        (loss, sums), gradients = value(model, shard_batch(batch, mesh, config))
    rests = jax.tree.leaves(shardings(gradients, mesh))
    for a, s in zip(jax.tree.leaves(gradients), rests, strict=True):
        assert mesh.size == 1 or a.sharding.is_equivalent_to(s, a.ndim), (a.sharding, s)
    by_layer = {}
    for name, a in flat(gradients).items():
        a = np.asarray(a)
        kind, _, rest = name.partition("/")
        if kind != "blocks":
            by_layer[name] = a
            continue
        block, _, rest = rest.partition("/")
        for layer in range(config.num_layers):
            at, row = config.locate(layer)
            if at == int(block):
                by_layer[f"{layer}/{rest}"] = a[row]
    return float(loss), by_layer, {name: np.asarray(a) for name, a in sums.items()}


for config, cases in CASES:
    one = dataclasses.replace(config, microbatches=None, circuits=1)
    if one.attention is not None:
        whole = dataclasses.replace(one.attention, context="gather")
        one = dataclasses.replace(one, attention=whole)
    want = found(make_mesh(MeshConfig(), jax.devices()[:1]), one)
    for mesh, options in cases:
        print(mesh, options, flush=True)
        changed = dataclasses.replace(config, **options)
        loss, gradients, sums = found(make_mesh(MeshConfig(**{"data": 1, **mesh})), changed)
        np.testing.assert_allclose(loss, want[0], rtol=1e-6)
        assert sums.keys() == want[2].keys()
        for name in sums:
            # how even a batch's choices are is not the mean of how even its parts' are
            close = 0.02 if name == "router_balance" else 1e-4
            np.testing.assert_allclose(sums[name], want[2][name], rtol=close, err_msg=name)
        assert gradients.keys() == want[1].keys()
        for name, a in gradients.items():
            np.testing.assert_allclose(
                a, want[1][name], rtol=1e-4, atol=2e-6, err_msg=f"{name} {mesh} {options}"
            )
print("passed")
"""

CASES = {
    "attention": """[(PLAIN, (
        (dict(stage=2, data=2, fsdp=2), dict(microbatches=4)),
        (dict(stage=4, tensor=2), dict(microbatches=8, remat="full")),
        (dict(stage=2, sequence=2, tensor=2), dict(microbatches=2, circuits=2)),
    ))]""",
    "others": """[
        (RING, ((dict(stage=2, sequence=2, data=2), dict(microbatches=4)),)),
        (MIXED, ((dict(stage=2, fsdp=2, tensor=2), dict(microbatches=2, circuits=2)),)),
        (EXPERTS, ((dict(stage=2, expert=2, data=2), dict(microbatches=2, circuits=2)),)),
    ]""",
}


@pytest.mark.parametrize("which", ["attention", pytest.param("others", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_one_device(run_script, which):
    assert run_script(GRADIENTS.replace("CASES", CASES[which])).endswith("passed\n")


TRAINS = (
    TRAINING
    + """
import sys
MODEL = dataclasses.replace(MODEL, num_layers=4)
TRAINING = dataclasses.replace(TRAINING, steps=4, checkpoint_every=2, eval_batches=1)
PIPELINE = dataclasses.replace(MODEL, microbatches=2)
DATA = dataclasses.replace(DATA, batch_size=16)


class Killed(Exception):
    pass


def killed(step, steps, metrics):
    if step == 3:
        raise Killed


def ends(model, mesh, **options):
    progress = options.pop("progress", quiet)
    result = train(model, DATA, TRAINING, mesh=mesh, progress=progress, **options)
    return [result.metrics[name] for name in ("loss", "eval_loss", "gradient_norm")]


one = ends(MODEL, MeshConfig(data=8))
mesh = MeshConfig(data=2, fsdp=2, stage=2)
# of these the gradient's norm differs most after Adam's first steps, by CPU up to 5e-4
np.testing.assert_allclose(ends(PIPELINE, mesh), one, rtol=1e-3)
try:
    ends(PIPELINE, mesh, workdir=sys.argv[1], progress=killed)
except Killed:
    pass
# what a pipeline saved goes on without one
np.testing.assert_allclose(ends(MODEL, MeshConfig(data=4, tensor=2), workdir=sys.argv[1]), one,
                           rtol=1e-3)
print("passed")
"""
)


def test_training_goes_on_without_stages_where_it_was_cut_off(run_script, tmp_path):
    assert run_script(TRAINS, tmp_path / "run").endswith("passed\n")


MODEL = DecoderConfig(64, 32, 4, AttentionConfig(4), MlpConfig(64), microbatches=4)


@pytest.mark.parametrize(
    "mesh, options, message",
    [
        (dict(stage=1), {}, "microbatches=4: changes nothing: mesh.stage=1"),
        (dict(stage=2), dict(microbatches=None), "microbatches=None: must be a multiple of mesh"),
        (dict(stage=2), dict(microbatches=3), "microbatches=3: must be a multiple of mesh.stage=2"),
        (
            dict(stage=4),
            dict(circuits=2),
            "num_layers=4: its 2 repeats of the pattern per circuit must be a multiple of mesh",
        ),
        (
            dict(stage=2),
            dict(microbatches=32),
            "batch_size=32: must be a multiple of microbatches × mesh.data×fsdp×expert=64",
        ),
        (dict(stage=2, zero=1), {}, "mesh.zero=1: must be 3: gradients cannot stay unreduced"),
    ],
)
def test_what_cannot_be_is_refused(mesh, options, message):
    pytest.importorskip("libtpu")
    config = MeshConfig(**{"data": 1, "fsdp": -1, **mesh})
    model = dataclasses.replace(MODEL, **options)
    with pytest.raises(ConfigError) as caught:
        check_setup(Setup(model, "v5p:2x2x1", config, 32, 32, TrainingConfig(steps=1)))
    assert str(caught.value).startswith(message)


@pytest.mark.tpu_compile
def test_a_tpu_moves_activations_every_tick_and_gradients_once():
    """Of two stages, each on two devices of ``data``: twice the ticks move activations; what is
    summed over ``data`` is summed once, however many the micro-batches."""
    pytest.importorskip("libtpu")
    found = {}
    for parts in (4, 8):
        model = dataclasses.replace(MODEL, microbatches=parts, dtype="bfloat16")
        setup = Setup(
            model, "v5p:2x2x1", MeshConfig(data=2, stage=2), 32, 128, TrainingConfig(steps=1)
        )
        planned = plan(setup)
        assert planned.collectives is not None
        found[parts] = planned.collectives["all-reduce"]
        assert planned.collectives["collective-permute"]["count"] == 2 * (parts + 1)
        # a stage's layers alone: half the parameters of the layers, all of the rest
        layers = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
        assert planned.bytes["parameters"] == 4 * (layers // 2 + 64 * 32 + 32)
        share = idle(2, parts, 1)
        head = 6.0 * 64 * 32 * 32 * 128
        executed, own = planned.flops["executed"], planned.flops["model"]
        assert executed - head == pytest.approx((own - head) / (1 - share))
    assert found[4] == found[8]
