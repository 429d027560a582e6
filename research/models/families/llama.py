"""Llama and similar models: Mistral, Qwen 2 and 3, OLMo 2, Phi-3."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from layers.attention import AttentionConfig
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.models.families.family import (
    Family,
    head_channels,
    layer_types,
    parts,
    read_pattern,
    read_rotary,
    supported,
    write_rotary,
)
from research.models.table import Row


def _read_llama(
    hf: Mapping[str, Any], pattern: tuple[str, ...] = ("attention",), **attention: Any
) -> DecoderConfig:
    """``attention``: fields of the `AttentionConfig` that the family fixes."""
    supported(hf, hidden_act="silu")
    heads = hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", False))
    sizes = dict(
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        window=hf["sliding_window"] if "sliding" in pattern else None,
        qkv_bias=bias,
        out_bias=bias,
    )
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        attention=AttentionConfig(**{**sizes, **attention}),
        mlp=MlpConfig(hf["intermediate_size"], "swiglu", bias=bool(hf.get("mlp_bias", False))),
        pattern=pattern,
        rotary=read_rotary(hf),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_length=hf.get("max_position_embeddings"),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    attention = config.part("attention")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": head_channels(config),
        "intermediate_size": config.part("mlp").width,
        "hidden_act": "silu",
        "attention_bias": attention.qkv_bias,
        "mlp_bias": config.part("mlp").bias,
        "rms_norm_eps": config.norm_eps,
        **write_rotary(config.rotary),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length or 4096,
    }


def _write_without(config: DecoderConfig, *absent: str) -> dict[str, Any]:
    return {name: value for name, value in _write_llama(config).items() if name not in absent}


def _window(config: DecoderConfig) -> int | None:
    return config.part("attention").window if "sliding" in config.pattern else None


def read_windowed(hf: Mapping[str, Any], **attention: Any) -> DecoderConfig:
    """A Llama-like config in which all layers have a sliding window, or none has one."""
    pattern = ("attention",) if hf["sliding_window"] is None else ("sliding",)
    return _read_llama({**hf, "attention_bias": False, "mlp_bias": False}, pattern, **attention)


def _read_mistral(hf: Mapping[str, Any]) -> DecoderConfig:
    # in transformers a missing window is 4096, and null is no window
    return read_windowed({"sliding_window": 4096, **hf})


def write_windowed(config: DecoderConfig) -> dict[str, Any]:
    written = _write_without(config, "attention_bias", "mlp_bias")
    return {**written, "sliding_window": _window(config)}


def _qwen_pattern(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The mixers of the layers: sliding as listed, or from layer ``max_window_layers`` on."""
    if not hf.get("use_sliding_window", False) or hf.get("sliding_window", 4096) is None:
        full = ["full_attention"] * hf["num_hidden_layers"]
        supported({"layer_types": hf.get("layer_types") or full}, layer_types=full)
        return ("attention",)
    full = hf.get("max_window_layers", 28)
    listed = hf.get("layer_types") or [
        "sliding_attention" if layer >= full else "full_attention"
        for layer in range(hf["num_hidden_layers"])
    ]
    return read_pattern(listed)


def _read_qwen2(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {"sliding_window": 4096, **hf, "mlp_bias": False}
    return _read_llama(hf, _qwen_pattern(hf), qkv_bias=True, out_bias=False)


def _read_qwen3(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {"sliding_window": 4096, "head_dim": 128, **hf, "mlp_bias": False}
    return _read_llama(hf, _qwen_pattern(hf), qk_norm=True)


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    window = _window(config)
    return {
        **_write_without(config, "mlp_bias"),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types(config),
    }


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    written = _write_qwen3(config)
    del written["attention_bias"]
    return written


def _read_olmo2(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {"rms_norm_eps": 1e-5, **hf, "mlp_bias": False}
    config = _read_llama(hf, qk_norm=True, qk_norm_across_heads=True)
    return dataclasses.replace(config, norm_position="output")


def _write_olmo2(config: DecoderConfig) -> dict[str, Any]:
    return _write_without(config, "mlp_bias")


def _read_phi3(hf: Mapping[str, Any]) -> DecoderConfig:
    return read_windowed({"rms_norm_eps": 1e-5, "sliding_window": None, **hf})


LAYER = "model.layers.{l}."
MODEL_ROWS = (
    Row("model.embed_tokens.weight", "v d -> v d", ("embedding/table",)),
    Row("model.norm.weight", "d -> d", ("final_norm/scale",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
)
# rows of parameters that the model lacks are left out
PROJECTION_ROWS = (
    Row(LAYER + "self_attn.q_proj.weight", "(h c) d -> d h c", ("mixer/query/weight",)),
    Row(LAYER + "self_attn.k_proj.weight", "(k c) d -> d k c", ("mixer/key/weight",)),
    Row(LAYER + "self_attn.v_proj.weight", "(k c) d -> d k c", ("mixer/value/weight",)),
    Row(LAYER + "self_attn.q_proj.bias", "(h c) -> h c", ("mixer/query/bias",)),
    Row(LAYER + "self_attn.k_proj.bias", "(k c) -> k c", ("mixer/key/bias",)),
    Row(LAYER + "self_attn.v_proj.bias", "(k c) -> k c", ("mixer/value/bias",)),
)
OUT_ROWS = (
    Row(LAYER + "self_attn.o_proj.weight", "d (h c) -> h c d", ("mixer/out/weight",)),
    Row(LAYER + "self_attn.o_proj.bias", "d -> d", ("mixer/out/bias",)),
)
DOWN_ROWS = (
    Row(LAYER + "mlp.down_proj.weight", "d f -> f d", ("mlp/down/weight",)),
    Row(LAYER + "mlp.down_proj.bias", "d -> d", ("mlp/down/bias",)),
)
MLP_ROWS = (
    Row(LAYER + "mlp.gate_proj.weight", "f d -> d f", ("mlp/gate/weight",)),
    Row(LAYER + "mlp.gate_proj.bias", "f -> f", ("mlp/gate/bias",)),
    Row(LAYER + "mlp.up_proj.weight", "f d -> d f", ("mlp/up/weight",)),
    Row(LAYER + "mlp.up_proj.bias", "f -> f", ("mlp/up/bias",)),
    *DOWN_ROWS,
)
HEAD_NORM_ROWS = (
    Row(LAYER + "self_attn.q_norm.weight", "c -> c", ("mixer/query_norm/scale",)),
    Row(LAYER + "self_attn.k_norm.weight", "c -> c", ("mixer/key_norm/scale",)),
)


def norm_rows(**names: str) -> tuple[Row, ...]:
    """Rows of a layer's norms: name in the Decoder → name in the checkpoint."""
    return tuple(
        Row(f"{LAYER}{name}.weight", "d -> d", (f"{path}/scale",)) for path, name in names.items()
    )


PRE_NORM_ROWS = norm_rows(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_LLAMA_ROWS = MODEL_ROWS + PRE_NORM_ROWS + PROJECTION_ROWS + OUT_ROWS + MLP_ROWS
_OLMO2_ROWS = (
    *MODEL_ROWS,
    *norm_rows(
        mixer_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
    ),
    Row(LAYER + "self_attn.q_norm.weight", "(h c) -> h c", ("mixer/query_norm/scale",)),
    Row(LAYER + "self_attn.k_norm.weight", "(k c) -> k c", ("mixer/key_norm/scale",)),
    *PROJECTION_ROWS,
    *OUT_ROWS,
    *MLP_ROWS,
)
_PHI3_ROWS = (
    *MODEL_ROWS,
    *PRE_NORM_ROWS,
    Row(
        LAYER + "self_attn.qkv_proj.weight",
        "(s c) d -> d s c",
        parts("mixer", "weight", "query", "key", "value"),
        join=1,
    ),
    Row(
        LAYER + "mlp.gate_up_proj.weight",
        "s d -> d s",
        parts("mlp", "weight", "gate", "up"),
        join=1,
    ),
    *OUT_ROWS,
    *DOWN_ROWS,
)

LLAMAS = (
    Family("LlamaForCausalLM", "llama", _read_llama, _write_llama, _LLAMA_ROWS),
    Family("MistralForCausalLM", "mistral", _read_mistral, write_windowed, _LLAMA_ROWS),
    Family("Qwen2ForCausalLM", "qwen2", _read_qwen2, _write_qwen2, _LLAMA_ROWS),
    Family("Qwen3ForCausalLM", "qwen3", _read_qwen3, _write_qwen3, _LLAMA_ROWS + HEAD_NORM_ROWS),
    Family("Olmo2ForCausalLM", "olmo2", _read_olmo2, _write_olmo2, _OLMO2_ROWS),
    Family("Phi3ForCausalLM", "phi3", _read_phi3, write_windowed, _PHI3_ROWS),
)
