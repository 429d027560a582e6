"""Gemma 2 and 3 (text): norms on both sides, full layers among sliding ones, scaled embeddings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from layers.attention import AttentionConfig
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.rotary import RotaryConfig
from research.models.families.family import (
    Family,
    head_channels,
    layer_types,
    read_pattern,
    read_rotary,
    rope_parameters,
    supported,
    write_rotary,
)
from research.models.families.llama import (
    HEAD_NORM_ROWS,
    MLP_ROWS,
    MODEL_ROWS,
    OUT_ROWS,
    PROJECTION_ROWS,
    norm_rows,
)


def _read(
    hf: Mapping[str, Any],
    kinds: Sequence[str],
    rotary: RotaryConfig,
    sliding_rotary: RotaryConfig | None = None,
    qk_norm: bool = False,
) -> DecoderConfig:
    """``kinds``: the type of each layer, if config.json does not list them."""
    supported(hf, hidden_activation="gelu_pytorch_tanh")
    # null and false both mean causal attention
    supported({"use_bidirectional_attention": bool(hf.get("use_bidirectional_attention"))},
              use_bidirectional_attention=False)  # fmt: skip
    channels = hf.get("head_dim", 256)
    scalar = hf.get("query_pre_attn_scalar", 256)
    bias = bool(hf.get("attention_bias", False))
    pattern = read_pattern(hf.get("layer_types") or kinds)
    slides = "sliding" in pattern
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        attention=AttentionConfig(
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf["num_key_value_heads"],
            head_dim=channels,
            window=hf.get("sliding_window", 4096) if slides else None,
            soft_cap=hf.get("attn_logit_softcapping"),
            qk_norm=qk_norm,
            qkv_bias=bias,
            out_bias=bias,
            scale=scalar**-0.5,
        ),
        mlp=MlpConfig(hf["intermediate_size"], "geglu_tanh"),
        pattern=pattern,
        rotary=rotary,
        sliding_rotary=sliding_rotary if slides else None,
        norm="rmsnorm_1p",
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        norm_position="both",
        embedding_scale=hf["hidden_size"] ** 0.5,
        logit_cap=hf.get("final_logit_softcapping"),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        max_length=hf.get("max_position_embeddings"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    attention = config.part("attention")
    scalar = head_channels(config) if attention.scale is None else attention.scale**-2
    whole = round(scalar)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": head_channels(config),
        # a scale that was read from an integer is written as that integer, without rounding errors
        "query_pre_attn_scalar": whole if math.isclose(whole, scalar, rel_tol=1e-9) else scalar,
        "intermediate_size": config.part("mlp").width,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": attention.qkv_bias,
        "attn_logit_softcapping": attention.soft_cap,
        "final_logit_softcapping": config.logit_cap,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": attention.window if "sliding" in config.pattern else None,
        "layer_types": layer_types(config),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length or 8192,
    }


def _every(hf: Mapping[str, Any], period: int) -> list[str]:
    """Layer types: every ``period``-th layer is full, the others slide."""
    return [
        "sliding_attention" if layer % period else "full_attention"
        for layer in range(1, hf["num_hidden_layers"] + 1)
    ]


def _read_gemma2(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **hf}
    return _read(hf, _every(hf, 2), read_rotary(hf))


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return {**_write(config), **write_rotary(config.rotary)}


def _read_gemma3(hf: Mapping[str, Any]) -> DecoderConfig:
    # transformers ≥ 5 has one table per layer type; before, scaling applied to full layers only
    tables = hf.get("rope_parameters") or {}
    full = read_rotary({**hf, "rope_parameters": tables.get("full_attention")}, rope_theta=1e6)
    local = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
    sliding = read_rotary({**local, "rope_parameters": tables.get("sliding_attention")})
    kinds = _every(hf, hf.get("sliding_window_pattern", 6))
    return _read(hf, kinds, full, sliding, qk_norm=True)


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    full, sliding = config.rotary, config.sliding_rotary or config.rotary
    return {
        **_write(config),
        **write_rotary(full),
        "rope_local_base_freq": sliding.base,
        "rope_parameters": {
            "full_attention": rope_parameters(full),
            "sliding_attention": rope_parameters(sliding),
        },
    }


_GEMMA_ROWS = (
    *MODEL_ROWS,
    *norm_rows(
        mixer_norm="input_layernorm",
        mixer_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    *PROJECTION_ROWS,
    *OUT_ROWS,
    *MLP_ROWS,
    *HEAD_NORM_ROWS,
)

GEMMAS = (
    Family("Gemma2ForCausalLM", "gemma2", _read_gemma2, _write_gemma2, _GEMMA_ROWS),
    Family("Gemma3ForCausalLM", "gemma3_text", _read_gemma3, _write_gemma3, _GEMMA_ROWS),
)
