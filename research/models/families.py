"""The families: Llama, Mistral and GPT-2. A family is its configuration both ways, and its rows."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from layers.attention import AttentionConfig
from layers.config import ConfigError, check, check_choice
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.rotary import RotaryConfig
from research.models.table import Row


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family of checkpoints maps to a `Decoder`.

    ``architecture`` and ``model_type`` as in config.json; ``read`` and ``write`` translate
    configurations; ``prefix`` is part of the rows' names and may be missing in a checkpoint;
    ``ignored`` are endings of tensors that hold no parameters.
    """

    architecture: str
    model_type: str
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


def _rope_base(hf: Mapping[str, Any]) -> float:
    """θ's base: ``rope_parameters`` (transformers ≥ 5) or ``rope_theta``; plain rotary only."""
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check(kind == "default", "rope_parameters.rope_type", kind, "only 'default' is supported")
    return float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))


def _read_llama(hf: Mapping[str, Any]) -> DecoderConfig:
    check(
        hf.get("hidden_act", "silu") == "silu", "hidden_act", hf.get("hidden_act"), "must be silu"
    )
    window = hf.get("sliding_window")
    bias = bool(hf.get("attention_bias", False))
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            window=window,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=MlpConfig(hf["intermediate_size"], "swiglu", bias=bool(hf.get("mlp_bias", False))),
        pattern=("attention",) if window is None else ("sliding",),
        rotary=RotaryConfig(base=_rope_base(hf)),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    attention = config.part("attention")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.channels(config.width),
        "intermediate_size": config.part("mlp").width,
        "hidden_act": "silu",
        "attention_bias": attention.qkv_bias,
        "mlp_bias": config.part("mlp").bias,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary.base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary.base},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length or 4096,
    }


def _read_mistral(hf: Mapping[str, Any]) -> DecoderConfig:
    # transformers reads an absent window as 4096, and null as none
    window = hf.get("sliding_window", 4096)
    return _read_llama({**hf, "sliding_window": window, "attention_bias": False, "mlp_bias": False})


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    written = _write_llama(config)
    del written["attention_bias"], written["mlp_bias"]
    sliding = config.pattern == ("sliding",)
    return {**written, "sliding_window": config.part("attention").window if sliding else None}


_LLAMA_ROWS = (
    Row("model.embed_tokens.weight", "v d -> v d", ("embedding/table",)),
    Row("model.norm.weight", "d -> d", ("final_norm/scale",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    Row("model.layers.{l}.input_layernorm.weight", "d -> d", ("mixer_norm/scale",)),
    Row("model.layers.{l}.post_attention_layernorm.weight", "d -> d", ("mlp_norm/scale",)),
    Row("model.layers.{l}.self_attn.q_proj.weight", "(h c) d -> d h c", ("mixer/query/weight",)),
    Row("model.layers.{l}.self_attn.k_proj.weight", "(k c) d -> d k c", ("mixer/key/weight",)),
    Row("model.layers.{l}.self_attn.v_proj.weight", "(k c) d -> d k c", ("mixer/value/weight",)),
    Row("model.layers.{l}.self_attn.o_proj.weight", "d (h c) -> h c d", ("mixer/out/weight",)),
    Row("model.layers.{l}.self_attn.q_proj.bias", "(h c) -> h c", ("mixer/query/bias",)),
    Row("model.layers.{l}.self_attn.k_proj.bias", "(k c) -> k c", ("mixer/key/bias",)),
    Row("model.layers.{l}.self_attn.v_proj.bias", "(k c) -> k c", ("mixer/value/bias",)),
    Row("model.layers.{l}.self_attn.o_proj.bias", "d -> d", ("mixer/out/bias",)),
    *(
        row
        for name in ("gate", "up")
        for row in (
            Row(
                f"model.layers.{{l}}.mlp.{name}_proj.weight", "f d -> d f", (f"mlp/{name}/weight",)
            ),
            Row(f"model.layers.{{l}}.mlp.{name}_proj.bias", "f -> f", (f"mlp/{name}/bias",)),
        )
    ),
    Row("model.layers.{l}.mlp.down_proj.weight", "d f -> f d", ("mlp/down/weight",)),
    Row("model.layers.{l}.mlp.down_proj.bias", "d -> d", ("mlp/down/bias",)),
)

# theirs → ours
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _read_gpt2(hf: Mapping[str, Any]) -> DecoderConfig:
    activation = hf.get("activation_function", "gelu_new")
    check_choice("activation_function", activation, _GPT2_ACTIVATIONS)
    for field, only in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        value = hf.get(field, only)
        check(value == only, field, value, f"only {only} is supported")
    heads, width = hf["n_head"], hf["n_embd"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        num_layers=hf["n_layer"],
        attention=AttentionConfig(
            heads, heads, head_dim=width // heads, qkv_bias=True, out_bias=True
        ),
        mlp=MlpConfig(hf.get("n_inner") or 4 * width, _GPT2_ACTIVATIONS[activation], bias=True),
        position="learned",
        max_length=hf["n_positions"],
        norm="layernorm",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        norm_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _GPT2_ACTIVATIONS.items()}
    check_choice("mlp.activation", config.part("mlp").activation, theirs)
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.part("attention").num_heads,
        "n_inner": config.part("mlp").width,
        "activation_function": theirs[config.part("mlp").activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _qkv(part: str) -> tuple[str, ...]:
    return tuple(f"mixer/{name}/{part}" for name in ("query", "key", "value"))


def _affine(name: str, path: str) -> tuple[Row, Row]:
    return (
        Row(f"{name}.weight", "d -> d", (f"{path}/scale",)),
        Row(f"{name}.bias", "d -> d", (f"{path}/bias",)),
    )


# Conv1D keeps weights [in, out]; query, key and value are one tensor
_GPT2_ROWS = (
    Row("transformer.wte.weight", "v d -> v d", ("embedding/table",)),
    Row("transformer.wpe.weight", "t d -> t d", ("positions/table",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    *_affine("transformer.ln_f", "final_norm"),
    *_affine("transformer.h.{l}.ln_1", "mixer_norm"),
    *_affine("transformer.h.{l}.ln_2", "mlp_norm"),
    Row("transformer.h.{l}.attn.c_attn.weight", "d (n h c) -> n d h c", _qkv("weight")),
    Row("transformer.h.{l}.attn.c_attn.bias", "(n h c) -> n h c", _qkv("bias")),
    Row("transformer.h.{l}.attn.c_proj.weight", "(h c) d -> h c d", ("mixer/out/weight",)),
    Row("transformer.h.{l}.attn.c_proj.bias", "d -> d", ("mixer/out/bias",)),
    Row("transformer.h.{l}.mlp.c_fc.weight", "d f -> d f", ("mlp/up/weight",)),
    Row("transformer.h.{l}.mlp.c_fc.bias", "f -> f", ("mlp/up/bias",)),
    Row("transformer.h.{l}.mlp.c_proj.weight", "f d -> f d", ("mlp/down/weight",)),
    Row("transformer.h.{l}.mlp.c_proj.bias", "d -> d", ("mlp/down/bias",)),
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("LlamaForCausalLM", "llama", _read_llama, _write_llama, _LLAMA_ROWS),
        Family("MistralForCausalLM", "mistral", _read_mistral, _write_mistral, _LLAMA_ROWS),
        Family(
            "GPT2LMHeadModel",
            "gpt2",
            _read_gpt2,
            _write_gpt2,
            _GPT2_ROWS,
            prefix="transformer.",
            ignored=(".attn.bias", ".attn.masked_bias"),
        ),
    )
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ConfigError: an architecture that is not supported; it is named, with those that are.
    """
    named = (hf.get("architectures") or [None])[0]
    for family in FAMILIES.values():
        if named == family.architecture or (
            named is None and hf.get("model_type") == family.model_type
        ):
            return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ConfigError(f"architecture={named or hf.get('model_type')!r}: must be one of {supported}")


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a config.json.

    Raises:
      ConfigError: an unsupported architecture or feature, or a field that is missing; it is named.
    """
    family = family_of(hf)
    try:
        return family.read(hf)
    except KeyError as missing:
        raise ConfigError(f"config.json: {missing.args[0]} is missing") from None
