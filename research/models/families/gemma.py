"""Gemma 2 and 3 (text): norms on both sides, full layers among sliding ones, scaled embeddings."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from layers.attention import AttentionConfig
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.rotary import RotaryConfig
from research.models.families.family import (
    Family,
    head_channels,
    layer_types,
    read_layers,
    read_pattern,
)
from research.models.families.llama import (
    HEAD_NORM_ROWS,
    MLP_ROWS,
    MODEL_ROWS,
    OUT_ROWS,
    PROJECTION_ROWS,
    norm_rows,
)
from research.models.families.rotary import read_rotary, rope_fields, rope_parameters, write_rotary
from research.models.families.unused import EVERYWHERE
from research.models.fields import REQUIRED, Fields


def _read(
    fields: Fields,
    period: int,
    rotary: RotaryConfig,
    sliding_rotary: RotaryConfig | None = None,
    logit_cap: float | None = None,
    sizes: Mapping[str, int] = MappingProxyType({}),
    **attention: Any,
) -> DecoderConfig:
    """``period``: every such layer is full, if config.json does not list the layers' types.

    ``logit_cap``, ``sizes``: defaults. ``attention``: further fields of the `AttentionConfig`.
    """
    fields.only(hidden_activation="gelu_pytorch_tanh")
    # null and false both mean causal attention
    if fields.flag("use_bidirectional_attention", None):
        fields.refuse("use_bidirectional_attention", True, "must be false")
    layers, width = read_layers(fields), fields.integer("hidden_size")

    def size(name: str) -> int:
        return fields.integer(name, sizes.get(name, REQUIRED))

    bias = fields.flag("attention_bias", False)
    listed = fields.texts("layer_types", None, count=layers)
    pattern = read_pattern(listed or _every(period, layers))
    slides = "sliding" in pattern
    window = fields.integer("sliding_window", 4096, null=None)
    return DecoderConfig(
        vocab_size=size("vocab_size"),
        width=width,
        num_layers=layers,
        attention=AttentionConfig(
            num_heads=size("num_attention_heads"),
            num_kv_heads=size("num_key_value_heads"),
            head_dim=fields.integer("head_dim", 256),
            window=window if slides else None,
            qkv_bias=bias,
            out_bias=bias,
            scale=fields.number("query_pre_attn_scalar", 256, above=0) ** -0.5,
            **attention,
        ),
        mlp=MlpConfig(fields.integer("intermediate_size"), "geglu_tanh"),
        pattern=pattern,
        rotary=rotary,
        sliding_rotary=sliding_rotary if slides else None,
        norm="rmsnorm_1p",
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0),
        norm_position="both",
        embedding_scale=width**0.5,
        logit_cap=fields.number("final_logit_softcapping", logit_cap, null=None, above=0),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        max_length=fields.integer("max_position_embeddings", None),
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
        # transformers requires a window even if no layer slides
        "sliding_window": attention.window or 4096,
        "layer_types": layer_types(config),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length or 8192,
    }


def _every(period: int, layers: int) -> list[str]:
    """Layer types: every ``period``-th layer is full, the others slide."""
    return [
        "sliding_attention" if layer % period else "full_attention"
        for layer in range(1, layers + 1)
    ]


def _read_gemma2(fields: Fields) -> DecoderConfig:
    cap = fields.number("attn_logit_softcapping", 50.0, null=None, above=0)
    return _read(fields, 2, read_rotary(fields), logit_cap=30.0, soft_cap=cap)


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return {**_write(config), **write_rotary(config.rotary)}


def _read_gemma3(fields: Fields) -> DecoderConfig:
    # transformers has the field and does not apply it
    fields.only(attn_logit_softcapping=None)
    # transformers ≥ 5 has one table per layer type; before, scaling applied to full layers only
    tables = fields.object("rope_parameters")
    full_table = rope_fields(fields, tables.object("full_attention"))
    sliding_table = tables.object("sliding_attention")
    # it reads these two from other places than for one table: the length from the tables alone,
    # and truncate beside them
    fields.only(original_max_position_embeddings=None)
    for table in (tables, full_table, sliding_table):
        table.only(truncate=True)
    full = read_rotary(fields, full_table, theta=1e6)
    sliding = read_rotary(fields, sliding_table, theta_name="rope_local_base_freq")
    period = fields.integer("sliding_window_pattern", 6)
    fields.only(_sliding_window_pattern=period)
    # published text parts lack what are transformers' defaults
    sizes = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
    return _read(fields, period, full, sliding, sizes=sizes, qk_norm=True)


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

_UNUSED = {"hidden_act": "transformers reads hidden_activation"}
_IMAGES = "of images, which are not supported"
_GEMMA3_UNUSED = {
    **_UNUSED,
    **dict.fromkeys(
        ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index",
         "boi_token_id", "eoi_token_id", "image_token_id", "mm_tokens_per_image"),
        _IMAGES,
    ),
    **{f"text_config.{name}": why for name, why in {**EVERYWHERE, **_UNUSED}.items()},
}  # fmt: skip
_OTHERS = ("vision_tower.", "multi_modal_projector.")
GEMMAS = (
    Family("Gemma2ForCausalLM", "gemma2", _read_gemma2, _write_gemma2, _GEMMA_ROWS, unused=_UNUSED),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _read_gemma3,
        _write_gemma3,
        _GEMMA_ROWS,
        also=("Gemma3TextModel",),
        composite={"gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Model")},
        # as published, as transformers ≥ 5 writes it, and without a head
        nested={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
            "language_model.": "model.",
        },
        skipped=(*_OTHERS, *(f"model.{name}" for name in _OTHERS)),
        unused=_GEMMA3_UNUSED,
    ),
)
