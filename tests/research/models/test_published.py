"""Forms in which checkpoints are published: other files, names, dtypes and rotations."""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers.config import ConfigError
from layers.rotary import frequencies
from layers.weights import flat
from research.cli import main
from research.models import FAMILIES, decoder_config, load, pickled, save
from research.models.fp8 import dequantize
from research.training import load_model
from tests.research.models.conftest import (
    CASES,
    ENDLESS,
    GPT2,
    LLAMA,
    LONGROPE,
    TOKENS,
    logits,
    logits_of,
    make,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def same(one, other):
    assert one.config == other.config
    for (name, a), b in zip(flat(one).items(), flat(other).values(), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def close(ours, theirs, tokens=TOKENS):
    np.testing.assert_allclose(
        logits(ours, tokens), logits_of(theirs, tokens), atol=1e-5, rtol=1e-5
    )


def described(directory):
    return json.loads((directory / "config.json").read_text())


def edit(directory, **fields):
    hf = {**described(directory), **fields}
    kept = {name: value for name, value in hf.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))


def transformers_model(kind, **fields):
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).eval()


# --- rotary embeddings


ROPES = {
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=3.0),
    "yarn_null": dict(rope_type="yarn", factor=None, original_max_position_embeddings=16),
    "yarn_exact": dict(
        rope_type="yarn", factor=3.0, original_max_position_embeddings=16, truncate=False,
        beta_fast=4.0, beta_slow=0.5, attention_factor=1.7,
    ),
    "yarn_mscale": dict(
        rope_type="yarn", factor=3.0, original_max_position_embeddings=16, mscale=0.7,
        mscale_all_dim=1.3,
    ),
    "longrope": dict(
        rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2], long_factor=[1.5, 2, 8, 40.0],
        original_max_position_embeddings=16,
    ),
    "longrope_factors": dict(
        rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2], long_factor=[1.5, 2, 8, 40.0],
        original_max_position_embeddings=16, factor=9.0, attention_factor=0.9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers_and_survive_the_round_trip(name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = dict(LLAMA, hidden_size=32, max_position_embeddings=96)
    fields["rope_parameters"] = {**ROPES[name], "rope_theta": 1e4}
    theirs = transformers.LlamaConfig(**copy.deepcopy(fields))
    length = 96 if "longrope" in name else None
    want, growth = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](theirs, "cpu", seq_len=length)
    config = decoder_config({"architectures": ["LlamaForCausalLM"], **fields})
    scaling = config.rotary.scaling
    np.testing.assert_allclose(scaling(frequencies(8, 1e4), 1e4), want.numpy(), rtol=1e-6)
    assert scaling.growth == pytest.approx(growth, rel=1e-9)
    written = FAMILIES["llama"].write(config)
    assert decoder_config({"architectures": ["LlamaForCausalLM"], **written}) == config
    again = transformers.LlamaConfig(**written)
    back, growth_back = ROPE_INIT_FUNCTIONS[scaling.kind](again, "cpu", seq_len=length)
    np.testing.assert_allclose(back.numpy(), want.numpy(), rtol=1e-6)
    assert growth_back == pytest.approx(growth, rel=1e-9)


def test_the_older_name_of_longrope_is_read():
    fields = dict(LLAMA, original_max_position_embeddings=16)
    rope = {name: value for name, value in ROPES["longrope"].items() if "rope_type" not in name}
    one, other = (
        decoder_config(
            {"architectures": ["LlamaForCausalLM"], **fields, "hidden_size": 32,
             "rope_scaling": {"type": kind, **rope}}
        )
        for kind in ("su", "longrope")
    )  # fmt: skip
    assert one == other and one.rotary.scaling.kind == "longrope"


def test_a_context_chooses_the_rotation_for_the_whole_run(tmp_path):
    """transformers chooses it for each input; at that length the two agree."""
    dynamic = dict(rope_type="dynamic", factor=3.0, rope_theta=1e4)
    fields = dict(LLAMA, max_position_embeddings=16, rope_parameters=dynamic)
    llama = transformers_model("Llama", **fields)
    llama.save_pretrained(tmp_path / "llama")
    close(load(tmp_path / "llama", context=TOKENS.shape[1]), llama)
    fresh = transformers_model("Llama", **fields)
    fresh.load_state_dict(llama.state_dict())
    ours = load(tmp_path / "llama")
    close(ours, fresh, TOKENS[:, :16])
    assert ours.config == load(tmp_path / "llama", context=7).config.__class__(
        **{**vars(ours.config)}
    )

    kind, fields = CASES["phi3_partial"]
    fields = dict(fields, original_max_position_embeddings=16)
    fields["rope_parameters"] = dict(LONGROPE, original_max_position_embeddings=16)
    phi = transformers_model(kind, **fields)
    phi.save_pretrained(tmp_path / "phi")
    long, short = load(tmp_path / "phi"), load(tmp_path / "phi", context=16)
    close(long, phi)
    close(short, phi, TOKENS[:, :16])
    assert long.config.rotary.scaling.length == 64
    imported = str(tmp_path / "imported")
    assert main(["import", str(tmp_path / "phi"), "--to", imported, "--context=16"]) == 0
    same(load_model(imported), short)
    # the length is not part of a checkpoint
    for number, model in enumerate((long, short)):
        save(model, tmp_path / f"saved{number}", "phi3")
        same(load(tmp_path / f"saved{number}"), long)


def test_a_context_that_changes_nothing_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    for context, message in ((8, "requires a model with a rope_type of dynamic or longrope"),
                             (0, "must be > 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^context={context}: {message}$"):
            load(tmp_path, context=context)


# --- names of architectures and tensors


BARE = ("gpt2", "bloom", "mpt", "qwen2", "gemma2", "gemma3", "mamba", "llama_biased_tied")


@pytest.mark.parametrize("name", BARE)
def test_a_model_without_its_head_is_read_if_they_are_tied(name, tmp_path):
    theirs = make(name)
    theirs.base_model.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "whole")
    [architecture] = described(tmp_path / "base")["architectures"]
    assert architecture == type(theirs.base_model).__name__ != type(theirs).__name__
    # transformers writes names without the prefix
    prefix = FAMILIES[theirs.config.model_type].prefix
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert not any(tensor.startswith(prefix) for tensor in names)
    same(load(tmp_path / "base"), load(tmp_path / "whole"))


def test_every_bare_name_is_that_of_transformers():
    for family in FAMILIES.values():
        if family.model_type != "rwkv7":
            mapping = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
            assert mapping[family.model_type] in family.kinds[family.model_type]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "rwkv"])
def test_a_missing_head_that_is_not_tied_is_refused_by_name(name, tmp_path):
    theirs = make(name)
    theirs.base_model.save_pretrained(tmp_path)
    head = FAMILIES[theirs.config.model_type].head
    with pytest.raises(ConfigError, match=f"^tensor='{head}': is missing"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["published", "as in memory", "without head"])
def test_the_text_part_of_a_gemma_3_with_images_is_read(form, tmp_path):
    text = make("gemma3")
    vision = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    config._attn_implementation = "eager"
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    (whole if form != "without head" else whole.model).save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("language_model.model.layers.0") for name in tensors)
    if form == "as in memory":
        tensors = {
            f"model.{name.replace('language_model.model.', 'language_model.')}": tensor
            for name, tensor in tensors.items()
        }
        assert tensors.keys() <= whole.state_dict().keys()
        save_file(tensors, path)
    text.save_pretrained(tmp_path / "text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("always", message=".* tensors of ")
        with pytest.warns(
            UserWarning, match=r"tensors of .*vision_tower\..*are not loaded"
        ) as seen:
            ours = load(tmp_path / "whole")
    assert len(seen) == 1
    want = load(tmp_path / "text")
    same(ours, want)
    # it is written as the text model alone
    save(ours, tmp_path / "saved", "gemma3_text", source=tmp_path / "whole")
    written = described(tmp_path / "saved")
    assert "text_config" not in written and "vision_config" not in written
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    np.testing.assert_array_equal(logits_of(again), logits_of(text))


def test_a_text_part_lacks_what_are_the_defaults_of_transformers():
    """As google/gemma-3-4b-it is published."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    file = {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": text, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = decoder_config(file)
    theirs = transformers.Gemma3TextConfig(**copy.deepcopy(text)).to_dict()
    assert config == decoder_config({**theirs, "max_position_embeddings": None})
    with pytest.raises(ConfigError, match="^text_config.num_hidden_layers: is missing$"):
        decoder_config({**file, "text_config": {}})
    with pytest.raises(ConfigError, match="text_config.num_hidden_layers='4': must be an integer"):
        decoder_config({**file, "text_config": {**text, "num_hidden_layers": "4"}})


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_gemma_whose_layers_are_all_full_runs_in_transformers(name, tmp_path):
    kind, fields = CASES[name]
    full = ["full_attention"] * fields["num_hidden_layers"]
    theirs = transformers_model(kind, **dict(fields, layer_types=full))
    theirs.save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in")
    assert ours.config.pattern == ("attention",)
    save(ours, tmp_path / "out", theirs.config.model_type)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    np.testing.assert_array_equal(logits_of(again), logits_of(theirs))


# --- MPT as its authors' code reads it


def authors_mpt(alibi):
    """An MPT of transformers, changed to what llm-foundry adds to it; and its fields."""
    fields = dict(vocab_size=62, d_model=16, n_layers=2, n_heads=4, max_seq_len=32, **ENDLESS)
    theirs = transformers_model("Mpt", **fields, no_bias=False)
    mpt, build = theirs.transformer, theirs.transformer.build_mpt_alibi_tensor

    def alibi_tensor(heads, length, **options):
        bias = build(heads, length, alibi_bias_max=5, **options)
        return bias if alibi else torch.zeros_like(bias)

    mpt.build_mpt_alibi_tensor = alibi_tensor
    new = {}

    def parameter(name, module, field, *shape):
        value = torch.nn.Parameter(0.5 * torch.randn(shape))
        module.register_parameter(field, value)
        new[f"transformer.{name}"] = value.detach().numpy()

    class Normed(torch.nn.Module):
        """``Wqkv``, clipped, with LayerNorm of queries and keys over all heads."""

        def __init__(self, linear, layer):
            super().__init__()
            self.linear, self.layer = linear, layer
            for part in ("q_ln", "k_ln"):
                for field in ("weight", "bias"):
                    parameter(f"blocks.{layer}.attn.{part}.{field}", self, f"{part}_{field}", 16)

        def forward(self, x):
            q, k, v = self.linear(x).clamp(-0.8, 0.8).chunk(3, dim=-1)
            norm = torch.nn.functional.layer_norm
            q = norm(q, (16,), self.q_ln_weight, self.q_ln_bias, 1e-5)
            k = norm(k, (16,), self.k_ln_weight, self.k_ln_bias, 1e-5)
            return torch.cat((q, k, v), dim=-1)

    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    parameter("norm_f.bias", mpt.norm_f, "bias", 16)
    for layer, block in enumerate(mpt.blocks):
        parameter(f"blocks.{layer}.norm_1.bias", block.norm_1, "bias", 16)
        parameter(f"blocks.{layer}.norm_2.bias", block.norm_2, "bias", 16)
        parameter(f"blocks.{layer}.attn.Wqkv.bias", block.attn.Wqkv, "bias", 48)
        parameter(f"blocks.{layer}.attn.out_proj.bias", block.attn.out_proj, "bias", 16)
        parameter(f"blocks.{layer}.ffn.up_proj.bias", block.ffn.up_proj, "bias", 64)
        parameter(f"blocks.{layer}.ffn.down_proj.bias", block.ffn.down_proj, "bias", 16)
        block.attn.Wqkv = Normed(block.attn.Wqkv, layer)
    if not alibi:
        parameter("wpe.weight", mpt, "positions", 32, 16)
        mpt.wte.register_forward_hook(lambda _, inputs, y: y + mpt.positions[: y.shape[1]])
    theirs.register_forward_hook(
        lambda _, inputs, output: setattr(output, "logits", 0.25 * output.logits)
    )
    attention = dict(alibi=alibi, alibi_bias_max=5, clip_qkv=0.8, qk_ln=True)
    fields |= dict(
        architectures=["MPTForCausalLM"], model_type="mpt", no_bias=False, attn_config=attention,
        logit_scale="inv_sqrt_d_model", learned_pos_emb=True,
    )  # fmt: skip
    tensors.pop("lm_head.weight", None)
    return theirs, fields, {**tensors, **new}


@pytest.mark.filterwarnings("ignore:no_bias, logit_scale, qk_ln, al.*applied as in the authors")
@pytest.mark.parametrize("alibi", [True, False])
def test_an_mpt_of_its_authors_is_read_with_all_that_transformers_ignores(alibi, tmp_path):
    theirs, fields, tensors = authors_mpt(alibi)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.warns(UserWarning, match="logit_scale, qk_ln, .*transformers does not"):
        ours = load(tmp_path / "in")
    close(ours, theirs)
    save(ours, tmp_path / "out", "mpt")
    same(load(tmp_path / "out"), ours)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


# --- fields that change nothing, or only numbers


@pytest.mark.parametrize(
    "name",
    [
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "gelu_python_tanh",
        "gelu_accurate",
        "gelu",
        "relu",
    ],
)
def test_activations_of_gpt2_are_those_of_transformers(name):
    from layers.mlp import ACTIVATIONS

    fields = dict(GPT2, architectures=["GPT2LMHeadModel"], activation_function=name)
    config = decoder_config({**fields, "reorder_and_upcast_attn": True})
    assert config == decoder_config(fields)
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    activation, _ = ACTIVATIONS[config.mlp.activation]
    want = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(activation(x), want, atol=1e-6)


# --- files of PyTorch


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied model, and its directory with safetensors."""
    theirs, directory = make("llama_biased_tied"), tmp_path_factory.mktemp("tied")
    theirs.save_pretrained(directory)
    return theirs, directory


@pytest.mark.parametrize("form", ["one", "shards", "legacy", "bfloat16"])
def test_files_of_pytorch_are_read(form, tied, tmp_path):
    theirs, directory = tied
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    # the embedding and the head share memory; a view does not begin where its memory does
    tensors = dict(theirs.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.stack((torch.zeros_like(tensors[name]), tensors[name]))[1]
    if form == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr() \
        or form == "bfloat16"  # fmt: skip
    if form == "shards":
        shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
        for shard in shards:
            part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
            torch.save(part, tmp_path / shard)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    else:
        legacy = {"_use_new_zipfile_serialization": False} if form == "legacy" else {}
        torch.save(tensors, tmp_path / "pytorch_model.bin", **legacy)
    want = load(directory)
    if form == "bfloat16":
        want = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), want)
    same(load(tmp_path), want)


def test_safetensors_precede_files_of_pytorch_and_those_require_pytorch(
    tied, tmp_path, monkeypatch
):
    theirs, directory = tied
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ConfigError, match="pytorch_model.bin': cannot be read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    same(load(tmp_path), load(directory))
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pytorch_model.bin': requires PyTorch: pip install"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="must hold model.safetensors or pytorch_model.bin$"):
        load(tmp_path)


# --- dtypes


BLOCK = [4, 3]


def quantized(directory, change=lambda tensors: None):
    """Write FP8 weights in blocks over those of ``directory``, as float64 NumPy computes them."""
    path, tensors, want = directory / "model.safetensors", {}, {}
    for name, weight in load_file(path).items():
        tensors[name] = want[name] = weight
        kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
        if weight.ndim != 2 or any(part in name for part in kept):
            continue
        n, m = weight.shape
        blocks = -(-n // BLOCK[0]), -(-m // BLOCK[1])
        scale = np.empty(blocks, np.float32)
        codes, exact = np.empty((n, m), jnp.float8_e4m3fn), np.empty((n, m))
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                rows = slice(i * BLOCK[0], (i + 1) * BLOCK[0])
                part = rows, slice(j * BLOCK[1], (j + 1) * BLOCK[1])
                scale[i, j] = np.abs(weight[part]).max() / 448
                codes[part] = (weight[part] / scale[i, j]).astype(jnp.float8_e4m3fn)
                exact[part] = codes[part].astype(np.float64) * np.float64(scale[i, j])
        tensors[name], tensors[f"{name}_scale_inv"], want[name] = codes, scale, exact
    change(tensors)
    save_file(tensors, path)
    config = dict(quant_method="fp8", fmt="e4m3", weight_block_size=BLOCK,
                  activation_scheme="dynamic")  # fmt: skip
    edit(directory, quantization_config=config)
    return tensors, want


def test_fp8_in_blocks_is_dequantized(tmp_path):
    """Sizes that are no multiples of a block's; layers after the last have scales too."""
    make("deepseek").save_pretrained(tmp_path / "fp8")
    tensors, want = quantized(
        tmp_path / "fp8",
        lambda tensors: tensors.update({
            "model.layers.2.eh_proj.weight": np.ones((4, 3), jnp.float8_e4m3fn),
            "model.layers.2.eh_proj.weight_scale_inv": np.ones((1, 1), np.float32),
        }),
    )  # fmt: skip
    count = sum(name.endswith("_scale_inv") for name in tensors)
    assert any(n % 4 and m % 3 for n, m in (t.shape for t in tensors.values() if t.ndim == 2))
    with pytest.warns(UserWarning, match=f"^{count} tensors are FP8: they are dequantised$"):
        ours = load(tmp_path / "fp8")
    save(ours, tmp_path / "out", "deepseek_v3", source=tmp_path / "fp8")
    assert "quantization_config" not in described(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, rtol=1e-7, err_msg=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    close(ours, theirs)


def test_fp8_is_the_formula_of_the_authors():
    """``weight_dequant`` of DeepSeek-V3's kernel.py, in torch, for blocks of 128."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(200, 300)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.1, 2, (2, 3)).astype(np.float32)
    x = torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    want = torch.empty(200, 300)
    for i in range(2):
        for j in range(3):
            part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            want[part] = x.to(torch.float32)[part] * float(scale[i, j])
    np.testing.assert_array_equal(dequantize(weight, scale, (128, 128)), want.numpy())


def test_a_block_that_is_larger_than_the_matrix_takes_no_memory():
    weight = np.array([[1, -2, 3], [4, 0.5, 6]], jnp.float8_e4m3fn)
    scale = np.full((1, 1), 0.5, np.float32)
    got = dequantize(weight, scale, (2**31, 10**400))
    np.testing.assert_array_equal(got, 0.5 * weight.astype(np.float32))


FP8 = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(FP8 + "_scale_inv"), f"tensor='{FP8}': is F8_E4M3: requires {FP8}_scale"),
        (lambda t: t.pop(FP8), f"tensor='{FP8}_scale_inv': is the scale of a tensor that does not"),
        (lambda t: t.update({FP8: t[FP8].astype(np.float32)}),
         f"tensor {FP8}='F32': must be F8_E4M3: it has scales"),
        (lambda t: t.update({FP8 + "_scale_inv": np.ones((2, 2), np.float32)}),
         rf"tensor {FP8}_scale_inv=\[2, 2\]: must have shape \[3, 6\]"),
        (lambda t: t.update({FP8 + "_scale_inv": np.ones((3, 6), jnp.float8_e8m0fnu)}),
         f"tensor {FP8}_scale_inv='F8_E8M0': must be F32 or BF16"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*tensors are FP8")
def test_fp8_without_its_scales_is_refused_by_name(change, message, tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    quantized(tmp_path, change)
    with pytest.raises(ConfigError, match=f"^{message}") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*tensors are FP8")
def test_fp8_that_no_field_announces_is_refused(tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    quantized(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale_inv")])
    edit(tmp_path, quantization_config=...)
    with pytest.raises(ConfigError, match="^tensor .*='F8_E4M3': must be F64, F32"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["deepseek", "mamba", "mamba2", "rwkv", "mixtral"])
def test_what_is_kept_in_float32_stays_float32(name, tmp_path):
    """A checkpoint in bfloat16, but for what transformers or the authors keep in float32."""
    kind, fields = CASES[name]
    kept = {
        "deepseek": ("mlp.gate.weight", "e_score_correction_bias"),
        "mamba": ("A_log", "mixer.D"),
        "mamba2": ("A_log", "mixer.D"),
        "rwkv": ("time_decay", "time_first"),
        "mixtral": ("gate.weight",),
    }[name]
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = {
        name: tensor if name.endswith(kept) else tensor.astype(jnp.bfloat16)
        for name, tensor in load_file(path).items()
    }
    assert any(tensor.dtype == np.float32 for tensor in tensors.values())
    save_file(tensors, path)
    ours = load(tmp_path / "in", param_dtype="bfloat16")
    save(ours, tmp_path / "out", theirs.config.model_type)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for tensor_name, tensor in tensors.items():
        assert written[tensor_name].dtype == tensor.dtype, tensor_name
        np.testing.assert_array_equal(written[tensor_name], tensor, err_msg=tensor_name)
    if name == "deepseek":
        again = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        gates = [t for n, t in again.state_dict().items() if n.endswith(kept)]
        assert gates and {gate.dtype for gate in gates} == {torch.float32}
