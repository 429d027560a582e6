"""Llama and similar models: Mistral, Qwen 2 and 3, OLMo 2, Phi-3."""

import dataclasses
from typing import Any

from layers.attention import AttentionConfig
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.rotary import RotaryConfig
from research.models.families.family import (
    Family,
    head_channels,
    layer_types,
    parts,
    read_layers,
    read_pattern,
)
from research.models.families.rotary import read_rotary, write_rotary
from research.models.fields import Fields
from research.models.table import Row


def read_llama(
    fields: Fields,
    *,
    pattern: tuple[str, ...] = ("attention",),
    window: int | None = None,
    rotary: RotaryConfig | None = None,
    eps: float = 1e-6,
    head_dim: int | None = None,
    bias: bool | None = None,
    mlp_bias: bool | None = None,
    **attention: Any,
) -> DecoderConfig:
    """The configuration of a Llama-like model.

    Args:
      rotary: default: `read_rotary`.
      eps, head_dim: defaults; ``head_dim=None``: heads divide the width.
      bias, mlp_bias: as the family fixes them; None: read ``attention_bias``, ``mlp_bias``.
      attention: further fields of the `AttentionConfig` that the family fixes.
    """
    fields.only(hidden_act="silu")
    width = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    channels = fields.integer("head_dim", head_dim, null=None)
    if channels is None:
        if width % heads:
            fields.refuse("num_attention_heads", heads, f"must divide hidden_size={width}")
        channels = width // heads
    bias = fields.flag("attention_bias", False) if bias is None else bias
    sizes = dict(
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads, null=heads),
        head_dim=channels,
        window=window,
        qkv_bias=bias,
        out_bias=bias,
    )
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=read_layers(fields),
        attention=AttentionConfig(**{**sizes, **attention}),
        mlp=MlpConfig(
            fields.integer("intermediate_size"),
            "swiglu",
            bias=fields.flag("mlp_bias", False) if mlp_bias is None else mlp_bias,
        ),
        pattern=pattern,
        rotary=read_rotary(fields) if rotary is None else rotary,
        norm_eps=fields.number("rms_norm_eps", eps, above=0),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_length=fields.integer("max_position_embeddings", None),
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


def read_windowed(fields: Fields, *, window: int | None = None, **options: Any) -> DecoderConfig:
    """A Llama-like config in which all layers have a sliding window, or none has one.

    ``window``: the default; null is no window.
    """
    window = fields.integer("sliding_window", window, null=None)
    pattern = ("attention",) if window is None else ("sliding",)
    return read_llama(
        fields, pattern=pattern, window=window, bias=False, mlp_bias=False, **options
    )  # fmt: skip


def _read_mistral(fields: Fields) -> DecoderConfig:
    return read_windowed(fields, window=4096)


def write_windowed(config: DecoderConfig) -> dict[str, Any]:
    written = _write_without(config, "attention_bias", "mlp_bias")
    return {**written, "sliding_window": _window(config)}


def _read_qwen(fields: Fields, **options: Any) -> DecoderConfig:
    """The layers that slide are listed, or they are those from ``max_window_layers`` on."""
    layers = read_layers(fields)
    listed = fields.texts("layer_types", None, count=layers)
    window = fields.integer("sliding_window", 4096, null=None)
    full = fields.integer("max_window_layers", 28, at_least=0)
    if not fields.flag("use_sliding_window", False) or window is None:
        if listed is not None and set(listed) != {"full_attention"}:
            fields.refuse("layer_types", listed, "must be full_attention without a sliding window")
        pattern = ("attention",)
    else:
        pattern = read_pattern(
            listed
            or [
                "sliding_attention" if layer >= full else "full_attention"
                for layer in range(layers)
            ]
        )
    window = window if "sliding" in pattern else None
    return read_llama(fields, pattern=pattern, window=window, mlp_bias=False, **options)


def _read_qwen2(fields: Fields) -> DecoderConfig:
    return _read_qwen(fields, bias=True, out_bias=False)


def _read_qwen3(fields: Fields) -> DecoderConfig:
    return _read_qwen(fields, head_dim=128, qk_norm=True)


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


def _read_olmo2(fields: Fields) -> DecoderConfig:
    config = read_llama(
        fields, eps=1e-5, mlp_bias=False, qk_norm=True, qk_norm_across_heads=True
    )  # fmt: skip
    return dataclasses.replace(config, norm_position="output")


def _write_olmo2(config: DecoderConfig) -> dict[str, Any]:
    return _write_without(config, "mlp_bias")


def _read_phi3(fields: Fields) -> DecoderConfig:
    # of the other kinds transformers supports none for this family; 4096 is its default
    kinds = ("default", "longrope", "su")
    rotary = read_rotary(fields, fraction=1.0, kinds=kinds, original_length=4096)
    return read_windowed(fields, rotary=rotary, eps=1e-5)


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

# fields of Llama that other families lack, and that their files may have
BIASES: dict[str, str] = dict.fromkeys(
    ("attention_bias", "mlp_bias"),
    "the family fixes which maps have biases; a tensor of another one is refused",
)
_PHI3_UNUSED = {
    **BIASES,
    "original_max_position_embeddings": "of longrope, which reads it",
}

LLAMAS = (
    Family("LlamaForCausalLM", "llama", read_llama, _write_llama, _LLAMA_ROWS),
    Family(
        "MistralForCausalLM", "mistral", _read_mistral, write_windowed, _LLAMA_ROWS, unused=BIASES
    ),
    Family("Qwen2ForCausalLM", "qwen2", _read_qwen2, _write_qwen2, _LLAMA_ROWS, unused=BIASES),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        _read_qwen3,
        _write_qwen3,
        _LLAMA_ROWS + HEAD_NORM_ROWS,
        unused=BIASES,
    ),
    Family("Olmo2ForCausalLM", "olmo2", _read_olmo2, _write_olmo2, _OLMO2_ROWS, unused=BIASES),
    Family("Phi3ForCausalLM", "phi3", _read_phi3, write_windowed, _PHI3_ROWS, unused=_PHI3_UNUSED),
)
