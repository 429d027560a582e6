"""The role of every parameter of every mixer, feed-forward layer and of the rest of a decoder."""

import math

import jax
import pytest
from flax import nnx

from layers.architecture import FEED_FORWARDS, MIXERS
from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.roles import Role
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from layers.weights import Declared, flat, map_declared
from tests.layers.test_weights import scaled

ATTENTION = AttentionConfig(
    6, 3, head_dim=4, qk_norm=True, qk_norm_across_heads=True, sinks=True, qkv_bias=True,
    out_bias=True,
)  # fmt: skip
LATENT = dict(rank=6, head_dim=4, rotary_dim=2, value_dim=5, bias=True)
NORM = {"scale", "bias"}
MAMBA_VECTORS = {
    *(f"{name}/bias" for name in ("into", "gate", "out")), "convolution/weight", "convolution/bias",
    "delta_bias", "log_rate", "skip",
}  # fmt: skip
LOW_RANKS = dict(decay=3, rate=6, residual=7, gate=8)

# name → (what it configures, its matrices as (inputs, outputs), its vectors); the width is 20
MIXER_CASES = {
    "attention": (
        dict(attention=ATTENTION),
        {"query": (20, 24), "key": (20, 12), "value": (20, 12), "out": (24, 20)},
        {
            *(f"{name}/bias" for name in ("query", "key", "value", "out")), "query_norm/scale",
            "key_norm/scale", "sinks",
        },
    ),
    "sliding": (
        dict(attention=AttentionConfig(5, window=2)),
        {"query": (20, 20), "key": (20, 20), "value": (20, 20), "out": (20, 20)},
        set(),
    ),
    "latent": (
        dict(latent=LatentConfig(3, **LATENT, query_rank=7), position="rotary"),
        {
            "query_down": (20, 7), "query_up": (7, 18), "latent_down": (20, 6),
            "rotary_key": (20, 2), "key": (6, 12), "value": (6, 15), "out": (15, 20),
        },
        {
            *(f"{name}/bias" for name in ("query_down", "latent_down", "rotary_key", "out")),
            "query_norm/scale", "latent_norm/scale",
        },
    ),
    "latent without a query rank": (
        dict(latent=LatentConfig(3, **{**LATENT, "bias": False}), position="rotary"),
        {
            "query": (20, 18), "latent_down": (20, 6), "rotary_key": (20, 2), "key": (6, 12),
            "value": (6, 15), "out": (15, 20),
        },
        {"latent_norm/scale"},
    ),
    "mamba": (
        dict(mamba=MambaConfig(state=3, bias=True, delta_rank=5)),
        {
            "into": (20, 40), "gate": (20, 40), "b": (40, 3), "c": (40, 3), "delta_down": (40, 5),
            "delta_up": (5, 40), "out": (40, 20),
        },
        MAMBA_VECTORS,
    ),
    "mamba without selection": (
        dict(mamba=MambaConfig(state=3, bias=True, selective=())),
        {"into": (20, 40), "gate": (20, 40), "out": (40, 20)},
        MAMBA_VECTORS | {"b", "c"},
    ),
    "mamba2": (
        dict(mamba=MambaConfig(state=3, head_dim=4, bias=True)),
        {
            "into": (20, 40), "gate": (20, 40), "b": (20, 3), "c": (20, 3), "delta": (20, 10),
            "out": (40, 20),
        },
        {
            *(f"{name}/bias" for name in ("into", "gate", "b", "c", "delta", "out")),
            *(f"convolutions/{n}/{p}" for n in ("into", "b", "c") for p in ("weight", "bias")),
            "delta_bias", "log_rate", "skip", "norm_scale",
        },
    ),
    "rwkv4": (
        dict(rwkv=RwkvConfig()),
        dict.fromkeys(("receptance", "key", "value", "out"), (20, 20)),
        {"bonus", "decay", "mix_key", "mix_value", "mix_receptance"},
    ),
    "rwkv7": (
        dict(rwkv=RwkvConfig(4, *LOW_RANKS.values())),
        dict.fromkeys(("receptance", "key", "value", "out"), (20, 20))
        | {f"{name}/down": (20, rank) for name, rank in LOW_RANKS.items()}
        | {f"{name}/up": (rank, 20) for name, rank in LOW_RANKS.items()},
        {
            *(f"mixes/{n}" for n in ("receptance", "decay", "key", "value", "rate", "gate")),
            *(f"{name}/up/bias" for name in ("decay", "rate", "residual")),
            "key_removal", "key_rate", "bonus", "norm_scale", "norm_bias",
        },
    ),
}  # fmt: skip
FEED_FORWARD_CASES = {
    "mlp": (
        dict(mlp=MlpConfig(11, bias=True)),
        {"gate": (20, 11), "up": (20, 11), "down": (11, 20)},
        {"gate/bias", "up/bias", "down/bias"},
    ),
    "rwkv4": (
        dict(mlp=MlpConfig(11)),
        {"key": (20, 11), "receptance": (20, 20), "value": (11, 20)},
        {"mix_key", "mix_receptance"},
    ),
    "rwkv7": (dict(mlp=MlpConfig(11)), {"key": (20, 11), "value": (11, 20)}, {"mix_key"}),
    "moe": (
        dict(moe=MoeConfig(3, 11, router="noisy", shared_experts=2)),
        {
            "router": (20, 3), "noise": (20, 3), "gate": (20, 11), "up": (20, 11),
            "down": (11, 20), "shared/gate": (20, 22), "shared/up": (20, 22),
            "shared/down": (22, 20),
        },
        set(),
    ),
    "moe with biases of its router": (
        dict(moe=MoeConfig(3, 11, activation="gelu", router="sigmoid")),
        {"router": (20, 3), "up": (20, 11), "down": (11, 20)},
        {"bias"},
    ),
    "none": (dict(), {}, set()),
}  # fmt: skip


def roles(scan=True, **options):
    """The path of each parameter → ``(role, inputs, outputs)``, or None."""
    config = DecoderConfig(
        **dict(vocab_size=14, width=20, num_layers=2, norm="layernorm", norm_bias=True)
        | dict(position="none", feed_forward=("none",), scan=scan)
        | options
    )
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return dict(zip(flat(model), of(model), strict=True))


def of(model):
    found = {}

    def collect(array, declared):
        if declared.role is not None:
            inputs, outputs = declared.role.sides(array, declared.axes)
            sizes = (math.prod(array.shape[i] for i in side) for side in (inputs, outputs))
            found[id(array)] = (declared.role.name, *sizes)

    map_declared(collect, model)
    return [found.get(id(array)) for array in flat(model).values()]


def matrix(path, part):
    """The name of a layer's weight, as in the cases."""
    return path.removeprefix(part).removesuffix("/weight")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("part", "name"),
    [*(("mixer", n) for n in MIXER_CASES), *(("mlp", n) for n in FEED_FORWARD_CASES)],
)
def test_each_parameter_of_a_layer_has_its_role(part, name, scan):
    kind = name.split()[0]
    if part == "mixer":
        options, matrices, vectors = MIXER_CASES[name]
        found = roles(scan, pattern=(kind,), **options)
    else:
        options, matrices, vectors = FEED_FORWARD_CASES[name]
        found = roles(
            scan, pattern=("rwkv4",), rwkv=RwkvConfig(), feed_forward=(kind,), **options
        )  # fmt: skip
    for layer in range(1 if scan else 2):
        prefix = f"blocks/{layer}/{part}/"
        mine = {path: role for path, role in found.items() if path.startswith(prefix)}
        assert {matrix(p, prefix): r for p, r in mine.items() if r is not None} == {
            n: ("matrix", *sizes) for n, sizes in matrices.items()
        }
        assert {p.removeprefix(prefix) for p, role in mine.items() if role is None} == vectors


def test_every_layer_that_can_be_selected_has_a_case():
    assert {name.split()[0] for name in MIXER_CASES} == set(MIXERS)
    assert {name.split()[0] for name in FEED_FORWARD_CASES} == set(FEED_FORWARDS)


@pytest.mark.parametrize("outputs", [None, 1])
def test_each_parameter_outside_layers_has_its_role(outputs):
    found = roles(
        attention=AttentionConfig(5), pattern=("attention",), position="learned", max_length=9,
        tie_embeddings=False, embedding_norm=True, outputs=outputs,
    )  # fmt: skip
    norms = {p: r for p, r in found.items() if "norm" in p}
    assert len(norms) == 6 and set(norms.values()) == {None}
    assert {p: r for p, r in found.items() if not p.startswith("blocks") and p not in norms} == {
        "embedding/table": ("embedding", 14, 20),
        "positions/table": ("embedding", 9, 20),
        "head/weight": ("head", 20, outputs or 14),
    }


def test_the_sides_of_a_product():
    assert Role.of_product("matrix", "bthc,hcd->btd") == Role("matrix", (0, 1), (2,))
    # a letter in both operands and the result is no side
    assert Role.of_product("matrix", "bed,edf->bef") == Role("matrix", (1,), (2,))


def test_an_array_of_a_leaf_has_the_role_if_it_has_the_axes():
    model = scaled(Decoder(DecoderConfig(14, 20, 2, AttentionConfig(5), MlpConfig(8)),
                           rngs=nnx.Rngs(0)))  # fmt: skip
    found = {}
    map_declared(lambda a, d: found.setdefault(id(a), d), model)
    declared = {path: found[id(a)] for path, a in flat(model).items()}
    query = "blocks/0/mixer/query/weight"
    axes = ("embed", "heads", "head_dim")
    assert declared[f"{query}/weight"] == Declared(axes, Role("matrix", (0,), (1, 2)))
    assert declared[f"{query}/scale"] == Declared(("head_dim",), None)
