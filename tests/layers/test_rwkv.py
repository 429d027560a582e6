"""RWKV-4 against transformers and RWKV-7 against the `rwkv` package, on the same random weights."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.hooks import Hooks
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from layers.stack import rearranged

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
LAYERS, WIDTH, HIDDEN = 3, 16, 40


def decoder(version, **fields):
    config = DecoderConfig(
        11, WIDTH, LAYERS,
        mlp=MlpConfig(HIDDEN), rwkv=RwkvConfig(8, 3, 4, 5, 6), position="none",
        pattern=(f"rwkv{version}",), feed_forward=(f"rwkv{version}",),
        norm="layernorm", norm_bias=True, norm_eps=1e-5, embedding_norm=True,
        tie_embeddings=False, **fields,
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0))


def fill(model, values):
    """``model`` with the float32 arrays of ``values``: path → one array, or one a layer."""
    leaves, structure = jax.tree.flatten_with_path(model)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    paths = [path.removesuffix("/value").replace("blocks/0/", "") for path in paths]
    assert set(paths) == set(values), set(paths) ^ set(values)
    new = [
        np.reshape(values[path], leaf.shape) for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in new])


def names(pairs, tensor):
    """Path → array, from pairs of our path and a name with ``{}`` for the layer."""
    found = {}
    for ours, theirs in pairs:
        layers = range(LAYERS) if "{}" in theirs else [None]
        each = [tensor(theirs.format(layer)).float().numpy() for layer in layers]
        each = [a.T if ours.endswith("weight") and theirs.endswith("weight") else a for a in each]
        found[ours] = np.stack(each) if "{}" in theirs else each[0]
    return found


NORMS = [
    ("mixer_norm/scale", "blocks.{}.ln1.weight"), ("mixer_norm/bias", "blocks.{}.ln1.bias"),
    ("mlp_norm/scale", "blocks.{}.ln2.weight"), ("mlp_norm/bias", "blocks.{}.ln2.bias"),
]  # fmt: skip


def moved(model):
    """Away from the zeros and ones of initial weights."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def test_rwkv4_is_transformers():
    from transformers import RwkvConfig as TheirConfig
    from transformers import RwkvForCausalLM

    torch.manual_seed(0)
    theirs = RwkvForCausalLM(
        TheirConfig(
            vocab_size=11, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=HIDDEN,
            rescale_every=0,
        )
    ).eval()  # fmt: skip
    moved(theirs)
    pairs = [
        ("embedding/table", "rwkv.embeddings.weight"),
        ("embedding_norm/scale", "rwkv.blocks.0.pre_ln.weight"),
        ("embedding_norm/bias", "rwkv.blocks.0.pre_ln.bias"),
        ("final_norm/scale", "rwkv.ln_out.weight"), ("final_norm/bias", "rwkv.ln_out.bias"),
        ("head/weight", "head.weight"),
        *((ours, f"rwkv.{name}") for ours, name in NORMS),
        ("mixer/decay", "rwkv.blocks.{}.attention.time_decay"),
        ("mixer/bonus", "rwkv.blocks.{}.attention.time_first"),
        *(
            (f"mixer/mix_{name}", f"rwkv.blocks.{{}}.attention.time_mix_{name}")
            for name in ("key", "value", "receptance")
        ),
        *(
            (f"mixer/{ours}/weight", f"rwkv.blocks.{{}}.attention.{name}.weight")
            for ours, name in (("key", "key"), ("value", "value"), ("receptance", "receptance"),
                               ("out", "output"))
        ),
        ("mlp/mix_key", "rwkv.blocks.{}.feed_forward.time_mix_key"),
        ("mlp/mix_receptance", "rwkv.blocks.{}.feed_forward.time_mix_receptance"),
        *(
            (f"mlp/{name}/weight", f"rwkv.blocks.{{}}.feed_forward.{name}.weight")
            for name in ("key", "value", "receptance")
        ),
    ]  # fmt: skip
    held = theirs.state_dict()
    table = names(pairs, lambda name: held[name])
    table["embedding/table"] = held["rwkv.embeddings.weight"].numpy()
    ours = fill(decoder(4), table)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS])).logits.numpy()
    got = ours(jnp.array([TOKENS])).logits_btv
    np.testing.assert_allclose(got, want, atol=2e-5)


LOW_RANK = {"decay": "w", "rate": "a", "residual": "v", "gate": "g"}


@pytest.mark.parametrize("scan", [False, True])
def test_rwkv7_is_the_published_package(scan, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    from rwkv.model import RWKV_x070

    assert os.environ["RWKV_V7_ON"] == "1"
    generator = torch.Generator().manual_seed(0)

    def random(*shape, at=0.0):
        return at + 0.3 * torch.randn(*shape, generator=generator)

    heads = WIDTH // 8
    held = {"emb.weight": random(11, WIDTH), "head.weight": random(11, WIDTH)}
    for name in ("ln_out", "blocks.0.ln0"):
        held |= {f"{name}.weight": random(WIDTH, at=1), f"{name}.bias": random(WIDTH)}
    for layer in range(LAYERS):
        for name in ("ln1", "ln2", "att.ln_x"):
            held[f"blocks.{layer}.{name}.weight"] = random(WIDTH, at=1)
            held[f"blocks.{layer}.{name}.bias"] = random(WIDTH)
        attention, feed = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        for letter in "rwkvag":
            held[f"{attention}.x_{letter}"] = random(1, 1, WIDTH, at=0.5)
        for letter, rank in (("w", 3), ("a", 4), ("v", 5), ("g", 6)):
            held[f"{attention}.{letter}1"] = random(WIDTH, rank)
            held[f"{attention}.{letter}2"] = random(rank, WIDTH)
            held[f"{attention}.{letter}0"] = random(1, 1, WIDTH)
        held[f"{attention}.k_k"], held[f"{attention}.k_a"] = (
            random(1, 1, WIDTH),
            random(1, 1, WIDTH),
        )
        held[f"{attention}.r_k"] = random(heads, 8)
        for name in ("receptance", "key", "value", "output"):
            held[f"{attention}.{name}.weight"] = random(WIDTH, WIDTH)
        held[f"{feed}.x_k"] = random(1, 1, WIDTH, at=0.5)
        held[f"{feed}.key.weight"] = random(HIDDEN, WIDTH)
        held[f"{feed}.value.weight"] = random(WIDTH, HIDDEN)
    torch.save(held, tmp_path / "model.pth")
    theirs = RWKV_x070(str(tmp_path / "model"), "cpu fp32")
    capsys.readouterr()
    with torch.no_grad():
        want, _ = theirs.forward(list(TOKENS), None, full_output=True)

    low_ranks = [
        (f"mixer/{ours}/{part}", f"blocks.{{}}.att.{letter}{digit}")
        for ours, letter in LOW_RANK.items()
        for part, digit in (("down/weight", 1), ("up/weight", 2), ("up/bias", 0))
        if (ours, part) != ("gate", "up/bias")
    ]
    mixes = dict(receptance="r", decay="w", key="k", value="v", rate="a", gate="g")
    pairs = [
        ("head/weight", "head.weight"),
        ("embedding_norm/scale", "blocks.0.ln0.weight"),
        ("embedding_norm/bias", "blocks.0.ln0.bias"),
        ("final_norm/scale", "ln_out.weight"), ("final_norm/bias", "ln_out.bias"),
        *NORMS, *low_ranks,
        *((f"mixer/mixes/{ours}", f"blocks.{{}}.att.x_{theirs}") for ours, theirs in mixes.items()),
        ("mixer/key_removal", "blocks.{}.att.k_k"), ("mixer/key_rate", "blocks.{}.att.k_a"),
        ("mixer/bonus", "blocks.{}.att.r_k"),
        ("mixer/norm_scale", "blocks.{}.att.ln_x.weight"),
        ("mixer/norm_bias", "blocks.{}.att.ln_x.bias"),
        *(
            (f"mixer/{ours}/weight", f"blocks.{{}}.att.{name}.weight")
            for ours, name in (("key", "key"), ("value", "value"), ("receptance", "receptance"),
                               ("out", "output"))
        ),
        ("mlp/mix_key", "blocks.{}.ffn.x_k"),
        ("mlp/key/weight", "blocks.{}.ffn.key.weight"),
        ("mlp/value/weight", "blocks.{}.ffn.value.weight"),
    ]  # fmt: skip
    table = names(pairs, lambda name: held[name])
    table["embedding/table"] = held["emb.weight"].numpy()
    ours = rearranged(fill(decoder(7), table), scan=scan)
    got = ours(jnp.array([TOKENS])).logits_btv[0]
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4, rtol=1e-4)


def test_initial_weights_are_the_papers():
    """RWKV-4: decays spread from e^−5 to e^3 a token; a higher layer mixes in less of the past."""
    mixer = decoder(4).blocks[0].mixer
    decay = np.asarray(mixer.decay[...])
    np.testing.assert_allclose(decay[:, 0], -5)
    np.testing.assert_allclose(decay[:, -1], 3, rtol=1e-6)
    share = np.asarray(mixer.mix_key[...])
    np.testing.assert_allclose(share[0], np.arange(WIDTH) / WIDTH, rtol=1e-6)
    assert np.all(np.diff(share[:, 1:], axis=0) > 0)
    w0 = np.asarray(decoder(7).blocks[0].mixer.decay.up.bias[...]).reshape(LAYERS, WIDTH)
    np.testing.assert_allclose(w0[:, 0], -6.5)
    np.testing.assert_allclose(w0[:, -1], -1.5)


def test_bfloat16_keeps_its_state_in_float32():
    model = decoder(7, dtype="bfloat16")
    tokens = jnp.array([TOKENS])
    exact = decoder(7)(tokens).logits_btv
    state = model.init_state(1, 11)
    assert state[0].mixer.matrix_bhcc.dtype == jnp.float32
    assert state[0].mixer.tail.values_bnd.dtype == jnp.bfloat16
    got = model(tokens, jnp.arange(11)[None], state=state).logits_btv
    np.testing.assert_allclose(got, exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_taps_see_the_mixers_output():
    model = decoder(4)
    taps = model(jnp.array([TOKENS]), hooks=Hooks(capture=("mixer.output",))).taps
    assert taps["mixer.output"].shape == (LAYERS, 1, 11, WIDTH)
    silent = Hooks(edit={"mixer.output": lambda x, layer: 0 * x})
    first, other = (model(jnp.array([[a, 5]]), hooks=silent).logits_btv[0, 1] for a in (1, 2))
    # the channel-mix still looks one token back
    assert not np.allclose(first, other)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rwkv=None), "rwkv=None: is required by 'rwkv4' layers"),
        (dict(rwkv=RwkvConfig(8, channels=8), pattern=("rwkv7",)),
         "rwkv.channels=8: requires a 'rwkv4' layer"),
        (dict(rwkv=RwkvConfig(8, rescale_every=2), pattern=("rwkv4", "rwkv7")),
         "rwkv.rescale_every=2: requires rwkv4 layers alone, with pre-norms"),
        (dict(final_norm_eps=1e-5, norm_position="post"),
         "final_norm_eps=1e-05: requires a norm_position other than 'post': there is no norm "
         "after the last layer"),
        (dict(logit_scale=0.0), "logit_scale=0.0: must be > 0 or None"),
        (dict(outputs=1, tie_embeddings=False, logit_scale=2.0),
         "logit_scale=2.0: must be None with outputs"),
        (dict(mlp=None), "mlp=None: is required by 'rwkv4' layers"),
        (dict(feed_forward=("rwkv5",)),
         "feed_forward[0]='rwkv5': must be one of mlp, rwkv4, rwkv7, moe, none "
         "(did you mean 'rwkv7'?)"),
        (dict(feed_forward=("mlp", "none")),
         "feed_forward=('mlp', 'none'): must name one layer, or one for each of pattern's 1"),
    ],
)  # fmt: skip
def test_a_stack_that_cannot_be(change, message):
    options = dict(
        mlp=MlpConfig(4), rwkv=RwkvConfig(8), pattern=("rwkv4",), feed_forward=("rwkv4",)
    )
    with pytest.raises(ConfigError) as raised:
        DecoderConfig(11, 16, 2, **(options | change))
    assert str(raised.value) == message


def test_a_head_that_does_not_divide():
    config = DecoderConfig(
        11, 20, 2, rwkv=RwkvConfig(8), pattern=("rwkv7",), feed_forward=("none",), position="none"
    )
    with pytest.raises(ConfigError, match="^rwkv.head_dim=8: must divide width=20"):
        jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
