"""Plans for slices that are not here: what they say, what they refuse, and where the edge is."""

import dataclasses
import itertools
import math

import jax
import pytest
from flax import nnx

from layers.architecture import REMAT
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from research.parallel import MeshConfig
from research.planning import report, sweep
from research.planning.plan import Plan, plan
from research.planning.step import Setup
from research.training import OptimizerConfig, TrainingConfig
from research.training.flops import (
    forward_flops_per_token,
    recomputed_flops_per_token,
    train_flops_per_token,
)
from research.training.objectives import NextToken

pytestmark = pytest.mark.tpu_compile

MODEL = DecoderConfig(
    vocab_size=256,
    width=256,
    num_layers=3,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=128),
    mlp=MlpConfig(width=512),
    dtype="bfloat16",
)
SETUP = Setup(MODEL, "v5e:2x2", MeshConfig(data=1, fsdp=4), 8, 256, TrainingConfig(steps=10))


@pytest.fixture(scope="module")
def planned():
    return plan(SETUP)


def test_bytes_are_the_state_s_and_what_the_program_adds(planned):
    model = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    sizes = {True: 0, False: 0}  # whether fsdp splits it: all but norms
    for leaf in jax.tree.leaves(model):
        sizes[math.prod(leaf.shape) > 3 * 256] += math.prod(leaf.shape)
    assert planned.parameters == sum(sizes.values())
    held = 4 * (sizes[True] // 4 + sizes[False])
    assert planned.bytes["parameters"] == held
    assert planned.bytes["moments"] == 2 * held + 4 + 4  # and two counters
    assert planned.bytes["batch"] == 5 * 4 * 8 * 256 // 4
    parts = [n for name, n in planned.bytes.items() if name not in ("total", "memory")]
    assert sum(parts) == planned.bytes["total"] < planned.bytes["memory"]
    assert planned.fits and planned.spare == planned.bytes["memory"] - planned.bytes["total"]


def test_collectives_and_the_floor_follow_from_the_program(planned):
    # seven weights of three layers, forward and backward; the table once or twice
    assert planned.collectives["all-gather"]["count"] in (43, 44)
    moved = sum(row["moved"] for row in planned.collectives.values())
    assert planned.floor["links"] == pytest.approx(moved / 200e9)
    assert planned.floor["compute"] == pytest.approx(planned.flops["executed"] / 4 / 197e12)
    assert planned.seconds == planned.floor[planned.bound] == max(planned.floor.values())


def test_what_does_not_fit_says_by_how_much():
    found = plan(dataclasses.replace(SETUP, training=None, sequence_length=2**22))
    assert not found.fits and found.collectives is None
    # a quarter of 3 · 8 · 2²² · 2 · 128 keys and as many values alone is more than the chip has
    assert found.bytes["cache"] > 2 * 3 * 2 * 2**22 * 2 * 128 * 2 > found.bytes["memory"]
    assert found.spare <= found.bytes["memory"] - found.bytes["cache"] < 0
    said = "\n".join(report.lines(report.Planned(("arm",), found)))
    assert "does not fit 15.75 GiB" in said and "the compiler gave up" in said


def test_decoding_holds_weights_and_cache():
    setup = dataclasses.replace(
        SETUP, mesh=MeshConfig(data=1, fsdp=2, tensor=2), training=None, sequence_length=1024
    )
    found = plan(setup)
    # keys and values of three layers, 2 heads of 128 channels, bfloat16; positions and segments
    numbers = 3 * 8 * 1024 * 2 * 128 * 2 * 2
    assert found.bytes["cache"] == numbers // 4 + 3 * (2 * 4 * 8 * 1024 + 4 * 8) // 2
    assert found.flops["model"] == 8 * forward_flops_per_token(
        jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))), 1024, cached=True
    )
    assert "moments" not in found.bytes and found.fits
    alone = plan(dataclasses.replace(setup, topology="v5e:1x1", mesh=MeshConfig()))
    assert alone.bytes["cache"] == numbers + 3 * (2 * 4 * 8 * 1024 + 4 * 8)
    assert alone.collectives == {}


RECURRENT = DecoderConfig(
    64, 32, 2, mlp=MlpConfig(64), rwkv=RwkvConfig(8, 4, 4, 4, 4), pattern=("rwkv7",)
)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(topology="v5x:2x2"), "topology='v5x:2x2': "),
        (dict(mesh=MeshConfig(data=1, fsdp=3)), "mesh=fsdp=3: requires 3 devices, there are 4"),
        (dict(mesh=MeshConfig(data=1, tensor=4)), "attention.num_kv_heads=2: must be a multiple"),
        (dict(mesh=MeshConfig(zero=1)), "mesh.zero=1: changes nothing: mesh.fsdp=1"),
        (
            dict(batch_size=6),
            "batch_size=6: must be a multiple of mesh.stage×data×fsdp×expert=4",
        ),
        (
            dict(training=TrainingConfig(steps=1, gradient_accumulation=4)),
            "training.gradient_accumulation=4: must divide the 2 rows of a device",
        ),
        (
            dict(training=None, mesh=MeshConfig(sequence=4, data=1)),
            "mesh.sequence=4: must be 1: one token has no time",
        ),
        (dict(training=None, model=RECURRENT), "model.pattern=.*'rwkv7'.*: must be attention"),
    ],
)
def test_what_cannot_be_planned_is_one_line_before_any_compile(options, message, monkeypatch):
    monkeypatch.setattr("research.planning.plan.compile_with_text", pytest.fail)
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        plan(dataclasses.replace(SETUP, **options))
    assert "\n" not in str(caught.value)


def _dots(jaxpr) -> float:
    """FLOPs of all products in a jaxpr, loops multiplied."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(left[i] for i in contracted)
            )
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * _dots(inner)
    return total


@pytest.mark.parametrize("remat", REMAT)
def test_flops_are_those_of_the_traced_program(remat):
    """Attention by its equation makes every score, so the reach is the whole length."""
    attention = dataclasses.replace(MODEL.attention, implementation="reference")
    config = dataclasses.replace(MODEL, attention=attention, remat=remat)
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    b, t = 2, 64
    ids, weights = (jax.ShapeDtypeStruct((b, t), d) for d in ("int32", "float32"))
    batch = dict(tokens=ids, targets=ids, positions=ids, segment_ids=ids, weights=weights)
    traced = jax.make_jaxpr(jax.grad(lambda m, b: NextToken()(m, b).total))(model, batch)
    counted = _dots(traced.jaxpr) / (b * t)
    half = 4 * config.num_layers * 4 * 128 * (t - (t + 1) / 2)  # scores that causality masks
    forwards = 3 if remat == "none" else 4
    found = train_flops_per_token(model, t) + recomputed_flops_per_token(model, t)
    assert found + forwards * half == pytest.approx(counted, rel=0.01)


def _remat(name: str, layers: int) -> Plan:
    """Of activations that are most of what the program has, gathered weights being none of it."""
    model = dataclasses.replace(MODEL, num_layers=layers, mlp=MlpConfig(1024), remat=name)
    found = plan(dataclasses.replace(SETUP, model=model, batch_size=16, sequence_length=1024))
    # seven weights a layer, in both passes: ZeRO-3 keeps none whatever is kept beside
    assert found.collectives["all-gather"]["count"] >= 2 * 7 * layers
    return found


@pytest.mark.slow
def test_a_tpu_holds_of_activations_what_remat_says():
    names = ("full", "narrow", "dots", "none")
    sizes = {name: _remat(name, 8).bytes["temporaries"] for name in names}
    for less, more in itertools.pairwise(names):
        assert 1.5 * sizes[less] < sizes[more], sizes
    assert 1.5 * _remat("dots_offload", 8).bytes["temporaries"] < sizes["dots"]
    # a few layers are on their way at a time, however many there are
    deep = [_remat(name, 32).bytes["temporaries"] for name in ("full_offload", "full")]
    assert 1.2 * deep[0] < deep[1], deep


@pytest.mark.slow
def test_8bit_moments_are_a_quarter_and_the_update_makes_no_others():
    model = dataclasses.replace(MODEL, width=512, mlp=MlpConfig(2048), remat="full", scan=True)
    full, packed = (
        plan(
            dataclasses.replace(
                SETUP, model=model, training=TrainingConfig(10, OptimizerConfig(moments=moments))
            )
        )
        for moments in ("full", "8bit")
    )
    # blocks of 16, 32 and 64 numbers
    assert 0.25 < packed.bytes["moments"] / full.bytes["moments"] < 0.31
    saved = full.bytes["moments"] - packed.bytes["moments"]
    assert full.bytes["total"] - packed.bytes["total"] > 0.5 * saved


def _stand_in(setup: Setup, memory=1000, base=100, slope=7) -> Plan:
    """A plan whose bytes are a line in the batch."""
    total = base + slope * setup.batch_size
    return Plan(
        setup, "stand-in", 4, {}, 1, dict(total=total, memory=memory), {}, {},
        {"compute": setup.batch_size / 1e3}, 1.0, 0.0,
    )  # fmt: skip


def test_the_largest_batch_that_fits_has_a_next_one_that_does_not(monkeypatch):
    compiled = []

    def stand_in(setup):
        compiled.append(setup.batch_size)
        return _stand_in(setup)

    monkeypatch.setattr(sweep, "plan", stand_in)
    for parts in (1, 2):
        setup = dataclasses.replace(
            SETUP, training=TrainingConfig(steps=1, gradient_accumulation=parts)
        )
        found, more = sweep.fit(setup)
        unit = 4 * parts
        assert found.setup.batch_size == (1000 - 100) // 7 // unit * unit
        assert more.setup.batch_size == found.setup.batch_size + unit
        assert found.fits and not more.fits
    assert len(compiled) < 12
    found, more = sweep.fit(SETUP, most=64)
    assert found.setup.batch_size == 64 and more is None
    monkeypatch.setattr(sweep, "plan", lambda setup: _stand_in(setup, memory=110))
    with pytest.raises(
        ConfigError, match="^batch_size=4: the smallest of this mesh exceeds .* by 18 B"
    ):
        sweep.fit(SETUP)


def test_a_sweep_compares_what_divides_the_model_and_names_the_best(monkeypatch):
    meshes = sweep.candidates(SETUP)
    shapes = {(m.data, m.fsdp, m.tensor, m.zero) for m in meshes}
    assert {(1, 4, 1, 1), (1, 4, 1, 2), (1, 4, 1, None), (1, 2, 2, None)} == shapes
    ring = dataclasses.replace(
        MODEL, attention=dataclasses.replace(MODEL.attention, context="ring")
    )
    shapes = [
        (m.fsdp, m.sequence, m.zero)
        for m in sweep.candidates(dataclasses.replace(SETUP, model=ring))
    ]
    assert shapes == [(2, 2, 1), (2, 2, 2), (2, 2, None)]
    plans = [
        dataclasses.replace(_stand_in(SETUP), floor={"compute": seconds}, bytes=bytes_)
        for seconds, bytes_ in (
            (1.0, dict(total=2000, memory=1000)),
            (3.0, dict(total=900, memory=1000)),
            (2.0, dict(total=900, memory=1000)),
            (2.0, dict(total=800, memory=1000)),
        )
    ]
    assert sweep.best(plans) is plans[3]
    assert sweep.best(plans[:1]) is None
    # twice the rows in less than twice the time
    setup = dataclasses.replace(SETUP, batch_size=2 * SETUP.batch_size)
    larger = dataclasses.replace(plans[3], setup=setup, floor={"compute": 3.0})
    assert sweep.best([*plans, larger]) is larger
    decoding = sweep.candidates(dataclasses.replace(SETUP, training=None))
    assert decoding and all(mesh.zero is None for mesh in decoding)
