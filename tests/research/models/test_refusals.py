"""What cannot be read or written is refused in one line that names it."""

import dataclasses
import json
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers.config import ConfigError
from research.models import FAMILIES, decoder_config, load, save
from tests.research.models.conftest import make

pytest.importorskip("torch")
pytest.importorskip("transformers")


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
            _edit("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}),
            "rope_type='dynamic': must be one of default, linear, llama3, yarn",
        ),
        (_tensors(lambda t: t.pop(NORM)), f"tensor='{NORM}': is missing"),
        (
            _tensors(lambda t: t.update({NORM: np.ones(31, np.float32)})),
            rf"tensor {NORM}=\[31\]: must have shape \[16\]",
        ),
        (
            _tensors(lambda t: t.update(extra=np.ones(1, np.float32))),
            "tensor='model.extra': is not part of a LlamaForCausalLM",
        ),
        (lambda d: (d / "config.json").unlink(), "must hold config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "must hold model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"1234"), "cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load(_broken(tmp_path, change))
    assert "\n" not in str(raised.value)


def test_a_missing_directory_field_or_shard_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere'.*does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="hidden_size: is missing"):
        decoder_config({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2})
    make("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match="model-00002.*is in the index but does not exist"):
        load(tmp_path)


def test_layers_after_the_last_are_left_out_and_unknown_tensors_are_not(tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    path, nothing = tmp_path / "model.safetensors", np.ones(1, np.float32)
    tensors = load_file(path)
    save_file({**tensors, "model.layers.2.eh_proj.weight": nothing}, path)
    load(tmp_path)
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.experts.0.up_proj.x"):
        save_file({**tensors, name: nothing}, path)
        with pytest.raises(ConfigError, match=f"tensor='{name}': is not part of a Deepseek"):
            load(tmp_path)
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    del tensors[expert]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=f"tensor='{expert}': is missing"):
        load(tmp_path)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A model of each of a few families."""
    found = {}
    for name in ("llama", "qwen3", "gpt2", "gpt_neox", "rwkv", "mixtral", "deepseek", "mamba"):
        directory = tmp_path_factory.mktemp(name)
        make(name).save_pretrained(directory)
        found[name] = load(directory)
    return found


@pytest.mark.parametrize(
    "name, family, message",
    [
        ("llama", "gpt2", "mlp.activation='swiglu': must be one of"),
        ("gpt2", "llama", "mlp.activation='gelu_tanh': a LlamaForCausalLM would have 'swiglu'"),
        ("qwen3", "llama", "attention.qk_norm=True: a LlamaForCausalLM would have False"),
        ("llama", "gemma2", "mlp.activation='swiglu': a Gemma2ForCausalLM would have 'geglu_tanh'"),
        ("gpt_neox", "bloom", "mlp.width=24: a BloomForCausalLM would have 128"),
        ("rwkv", "llama", "attention=None: this model has none"),
        ("gpt2", "rwkv", r"pattern=\('attention',\): a RwkvForCausalLM would have \('rwkv4',\)"),
        ("llama", "mixtral", "moe=None: this model has none"),
        ("mixtral", "llama", "mlp=None: this model has none"),
        ("deepseek", "mixtral", "attention=None: this model has none"),
        ("mixtral", "deepseek_v3", "latent=None: this model has none"),
        ("mamba", "rwkv", "rwkv=None|mlp=None: this model has none"),
    ],
)
def test_what_a_family_cannot_hold_is_not_written(held, name, family, message, tmp_path):
    refused(held[name], family, message, tmp_path)


@pytest.mark.parametrize(
    "name, family, part, changes, message",
    [
        ("mixtral", "mixtral", "moe", dict(router="softmax"),
         "moe.router='softmax': a MixtralForCausalLM would have 'choice_softmax'"),
        ("mixtral", "mixtral", "moe", dict(capacity_factor=2.0), "moe.capacity_factor=2.0"),
        ("mixtral", "mixtral", "moe", dict(shared_experts=1), "moe.shared_experts=1"),
        ("deepseek", "deepseek_v3", "latent", dict(scale=0.5), "latent.scale=0.5"),
        ("deepseek", "deepseek_v3", "latent", dict(norm_eps=1e-5), "latent.norm_eps=1e-05"),
        ("deepseek", "deepseek_v3", None,
         dict(feed_forward=("moe", "mlp"), pattern=("latent",) * 2), "feed_forward="),
        ("mamba", "mamba", "mamba", dict(selective=("b",)), r"mamba.selective=\('b',\)"),
    ],
)  # fmt: skip
def test_what_a_family_says_nothing_of_is_not_written(
    held, name, family, part, changes, message, tmp_path
):
    def changed(config):
        if part is None:
            return dataclasses.replace(config, **changes)
        whole = dataclasses.replace(getattr(config, part), **changes)
        return dataclasses.replace(config, **{part: whole})

    # the parameters are not looked at before the configuration is
    refused(types.SimpleNamespace(config=changed(held[name].config)), family, message, tmp_path)


def refused(model, family, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as raised:
        save(model, tmp_path / "a", family)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "a").exists()


def test_what_is_there_is_not_overwritten_and_a_family_is_named(held, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="must be absent or empty"):
        save(held["llama"], tmp_path, "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="family='lama'.*did you mean 'llama'"):
        save(held["llama"], tmp_path / "c", "lama")


@pytest.mark.filterwarnings("ignore:config.json")  # fields of other families
@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True),
         "scale_attn_by_inverse_layer_idx=True: must be false"),
        ("gpt2", dict(activation_function="swish"), "activation_function='swish': must be one of"),
        ("bloom", dict(apply_residual_connection_post_layernorm=True), "must be false"),
        ("bloom", dict(n_head=5, num_attention_heads=5), "heads=5: must divide the width 12"),
        ("mpt", dict(n_heads=6), "n_heads=6: must be a power of two"),
        ("mpt", dict(attn_config=dict(clip_qkv=6)), "attn_config.clip_qkv=6: must be null"),
        ("mpt", dict(no_bias=False), "no_bias=False: must be true"),
        ("rwkv", dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06: must be 1e-05"),
        ("rwkv", dict(attention_hidden_size=24), "attention_hidden_size=24: must be 12"),
        ("gemma2", dict(use_bidirectional_attention=True), "must be false"),
        ("gemma3_text", dict(layer_types=["chunked_attention"]),
         r"layer_types\[0\]='chunked_attention': must be one of full_attention, sliding"),
        ("qwen2", dict(layer_types=["sliding_attention"]), "layer_types="),
        ("phi3", dict(rope_scaling=dict(type="longrope")),
         "rope_scaling.type='longrope': must be one of default"),
        ("llama", dict(rope_scaling=dict(type="linear")), "rope_scaling.factor: is missing"),
        ("qwen3", dict(rope_scaling=dict(type="yarn", factor=2.0, truncate=False)),
         "rope_scaling.truncate=False: must be true"),
        ("mixtral", dict(hidden_act="gelu"), "hidden_act='gelu': must be silu"),
        ("mixtral", dict(num_experts_per_tok=9), "top_k=9: must be in 1 … num_experts=8"),
        ("deepseek_v3", dict(num_key_value_heads=1), "num_key_value_heads=1: must be 2"),
        ("deepseek_v3", dict(quantization_config=dict(quant_method="fp8")),
         "quantization_config={'quant_method': 'fp8'}: must be null"),
        ("deepseek_v3", dict(topk_method="greedy"), "topk_method='greedy': must be noaux_tc"),
        ("deepseek_v3", dict(n_group=16), "groups=16: must divide num_experts=8"),
        ("mamba", dict(hidden_act="gelu"), "hidden_act='gelu': must be silu"),
        ("mamba", dict(intermediate_size=20), "intermediate_size=20: must be 24"),
        ("mamba2", dict(time_step_limit=[0.0, 0.1]),
         r"time_step_limit=\[0.0, 0.1\]: must be \[0.0, Infinity\]"),
        ("mamba2", dict(num_heads=3), "num_heads=3: must be 4"),
        ("mamba2", dict(n_groups=3), "mamba.groups=3: must divide the 4 heads"),
        ("mamba2", dict(rms_norm=False), "rms_norm=False: must be true"),
    ],
)  # fmt: skip
def test_a_feature_that_is_not_supported_is_named(family, fields, message):
    sizes = dict(
        vocab_size=8, hidden_size=12, n_embd=12, d_model=12, n_layer=1, n_layers=1, n_head=2,
        n_heads=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24 if family == "mamba" else 4, n_positions=8, n_routed_experts=8,
        moe_intermediate_size=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4,
        v_head_dim=4, n_group=1, topk_group=1, n_groups=2, num_heads=4, head_dim=6,
    )  # fmt: skip
    hf = {"architectures": [FAMILIES[family].architecture], **sizes}
    decoder_config(hf)
    with pytest.raises(ConfigError, match=message) as raised:
        decoder_config({**hf, **fields})
    assert "\n" not in str(raised.value)
