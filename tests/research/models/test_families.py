"""Weights in and out of Hugging Face directories, against transformers on the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from layers.config import ConfigError
from research.models import decoder_config, load, save
from research.models.table import flat

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=61, max_position_embeddings=64)
LLAMA = dict(
    SMALL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CASES = {
    "llama": ("Llama", LLAMA),
    "llama_biased_tied": (
        "Llama",
        dict(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    ),
    "llama_base": ("Llama", dict(LLAMA, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=None)),
    "mistral_window": ("Mistral", dict(LLAMA, sliding_window=7)),
    "gpt2": ("GPT2", dict(vocab_size=61, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "gpt2_untied": (
        "GPT2",
        dict(
            vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=40,
            activation_function="relu", tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 23))


def make(name, seed=0):
    """A random transformers model; biases and norms are not left at 0 and 1."""
    kind, fields = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param)
    theirs.save_pretrained(directory, max_shard_size="20KB" if "tied" in request.param else "1GB")
    return theirs, load(directory, scan=False), directory


def test_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(TOKENS)).logits_btv, want, atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    from research.inference import SamplingConfig, generate

    prompt = TOKENS[:1, :9]
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0, 9:].tolist()  # fmt: skip
    got = generate(ours, prompt.tolist(), SamplingConfig(max_new_tokens=20, temperature=0.0))
    assert got[0] == want


def test_written_back_it_is_the_same_to_the_bit(pair, tmp_path):
    theirs, ours, directory = pair
    family = json.loads((directory / "config.json").read_text())["model_type"]
    out = tmp_path / "out"
    save(ours, out, family, shard_bytes=30_000)
    again = type(theirs).from_pretrained(out, attn_implementation="eager")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits
        assert torch.equal(again(torch.tensor(TOKENS)).logits, want)


def test_rope_theta_is_read_where_it_stands(pair):
    hf = json.loads((pair[2] / "config.json").read_text())
    if "rope_parameters" not in hf:
        pytest.skip("no rotary positions")
    new = decoder_config(hf)
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    old["rope_theta"] = hf["rope_parameters"]["rope_theta"]
    assert decoder_config(old) == new


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "gpt2"]),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    channels=st.sampled_from([2, 4, 6]),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    bias=st.booleans(),
    shard_bytes=st.integers(1, 5000),
)
def test_any_small_model_survives_the_round_trip(
    family, groups, kv_heads, channels, layers, tied, bias, shard_bytes, tmp_path_factory
):
    heads = kv_heads * groups
    if family == "gpt2":
        hf = dict(vocab_size=11, n_positions=8, n_embd=heads * channels, n_layer=layers)
        hf |= dict(n_head=heads, architectures=["GPT2LMHeadModel"])
    else:
        hf = dict(vocab_size=11, hidden_size=10, intermediate_size=6, num_hidden_layers=layers)
        hf |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=channels)
        hf |= dict(
            architectures=["LlamaForCausalLM" if family == "llama" else "MistralForCausalLM"]
        )
        hf |= dict(attention_bias=bias, mlp_bias=bias) if family == "llama" else {}
    hf["tie_word_embeddings"] = tied
    from flax import nnx

    from layers.decoder import Decoder

    model = Decoder(decoder_config(hf), rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    model = jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )
    out = tmp_path_factory.mktemp("round") / "trip"
    save(model, out, family, shard_bytes=shard_bytes)
    again = load(out)
    assert again.config.attention == model.config.attention
    for (path, before), after in zip(flat(model).items(), flat(again).values(), strict=True):
        np.testing.assert_array_equal(before, after, err_msg=path)


def test_bfloat16_is_read_and_kept(tmp_path):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype("bfloat16")}
    save(ours, tmp_path / "out", "llama")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_bare_gpt2_without_prefix_or_head_is_read(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    tensors.pop("lm_head.weight", None)
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(tensors, path)
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(load(tmp_path)(jnp.asarray(TOKENS)).logits_btv, want, atol=1e-5)


def test_sharded_over_8_devices_it_is_the_same_and_rests_where_the_table_says(run_script, tmp_path):
    theirs = make("llama")
    theirs.save_pretrained(tmp_path / "in")
    with torch.no_grad():
        np.save(tmp_path / "want.npy", theirs(torch.tensor(TOKENS)).logits.numpy())
    np.save(tmp_path / "tokens.npy", TOKENS)
    run_script(f"""
import jax, numpy as np
from research.models import load
from research.models.load import Reader
from research.parallel import MeshConfig, make_mesh, shardings, use_mesh

# never more than one tensor on the host at a time
import weakref
held, read = [], Reader.read
def counted(self, name):
    # what is not stacked over layers is itself the destination
    assert all(other() is None for name, other in held if "layers" in name), name
    tensor = read(self, name)
    view = tensor.view(type("Tracked", (np.ndarray,), {{}}))
    held.append((name, weakref.ref(view)))
    return view
Reader.read = counted
mesh = make_mesh(MeshConfig(data=4, fsdp=2))
model = load({str(tmp_path / "in")!r}, mesh=mesh)
for leaf, want in zip(jax.tree.leaves(model), jax.tree.leaves(shardings(model, mesh))):
    assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (leaf.shape, leaf.sharding, want)
assert len(held) > 10
tokens = np.repeat(np.load({str(tmp_path / "tokens.npy")!r}), 4, axis=0)
want = np.repeat(np.load({str(tmp_path / "want.npy")!r}), 4, axis=0)
from research.parallel import shard_batch
with use_mesh(mesh):
    batch = shard_batch({{"tokens": tokens.astype(np.int32)}}, mesh)
    got = jax.jit(lambda m, x: m(x).logits_btv)(model, batch["tokens"])
np.testing.assert_allclose(np.asarray(got), want, atol=1e-5, rtol=1e-5)
""")


def _broken(tmp_path, change):
    directory = tmp_path / "broken"
    make("llama").save_pretrained(directory)
    change(directory)
    return directory


def _edit(name, value):
    def change(directory):
        path = directory / "config.json"
        hf = json.loads(path.read_text())
        hf[name] = value
        path.write_text(json.dumps(hf))

    return change


def _tensors(f):
    def change(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        f(tensors)
        save_file(tensors, path)

    return change


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (_edit("architectures", ["BambaForCausalLM"]), "architecture='BambaForCausalLM': must be"),
        (_edit("hidden_act", "gelu"), "hidden_act='gelu': must be silu"),
        (
            _edit("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
            "rope_type='yarn': only 'default'",
        ),
        (_tensors(lambda t: t.pop(NORM)), f"tensor='{NORM}': is missing"),
        (
            _tensors(lambda t: t.update({NORM: np.ones(31, np.float32)})),
            rf"tensor {NORM}=\[31\]: must have shape \[32\]",
        ),
        (
            _tensors(lambda t: t.update(extra=np.ones(1, np.float32))),
            "tensor='model.extra': is no part of a LlamaForCausalLM",
        ),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"1234"), "cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load(_broken(tmp_path, change))
    assert "\n" not in str(raised.value)


def test_a_missing_directory_field_or_shard_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere'.*is not there"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="config.json: vocab_size is missing"):
        decoder_config({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2})
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match="model-00002.*is named by the index and missing"):
        load(tmp_path)


def test_what_a_family_cannot_hold_is_not_written(pair, tmp_path):
    _, ours, directory = pair
    family = json.loads((directory / "config.json").read_text())["model_type"]
    other = "gpt2" if family != "gpt2" else "llama"
    with pytest.raises(ConfigError):
        save(ours, tmp_path / "a", other)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is there and not empty"):
        save(ours, tmp_path / "b", family)
    with pytest.raises(ConfigError, match="family='lama'.*did you mean 'llama'"):
        save(ours, tmp_path / "c", "lama")


def test_an_absent_window_is_what_transformers_takes_it_for():
    transformers = pytest.importorskip("transformers")
    theirs = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    sizes |= dict(vocab_size=64, intermediate_size=48, num_key_value_heads=2)
    default = transformers.MistralConfig(**sizes).sliding_window
    assert decoder_config({**theirs, **sizes}).attention.window == default
    full = decoder_config({**theirs, **sizes, "sliding_window": None})
    assert full.attention.window is None and full.pattern == ("attention",)
