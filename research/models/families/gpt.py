"""The GPT family: GPT-2, GPT-NeoX and BLOOM, each with its own fused query, key, value."""

from typing import Any

from layers.attention import AttentionConfig
from layers.config import check, check_choice
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.models.families.family import (
    MOST_LAYERS,
    Family,
    affine,
    parts,
    read_layers,
)
from research.models.families.rotary import read_rotary, write_rotary
from research.models.fields import Fields
from research.models.table import Row

# activation in config.json → the Decoder's; of several names the first one is written
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def _read_activation(fields: Fields, name: str, default: str) -> str:
    return _ACTIVATIONS[fields.text(name, default, choices=_ACTIVATIONS)]


def _write_activation(config: DecoderConfig) -> str:
    names = {activation: name for name, activation in reversed(_ACTIVATIONS.items())}
    check_choice("mlp.activation", config.part("mlp").activation, names)
    return names[config.part("mlp").activation]


def heads_of_width(heads: int, width: int, bias: bool, **options: Any) -> AttentionConfig:
    """Multi-head attention whose heads together have the model's width."""
    check(width % heads == 0, "heads", heads, f"must divide the width {width}")
    return AttentionConfig(
        heads, heads, head_dim=width // heads, qkv_bias=bias, out_bias=bias, **options
    )


def _read_gpt2(fields: Fields) -> DecoderConfig:
    scaled = fields.flag("scale_attn_weights", True)
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    width = fields.integer("n_embd")
    activation = _read_activation(fields, "activation_function", "gelu_new")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=read_layers(fields, "n_layer"),
        attention=heads_of_width(
            fields.integer("n_head"),
            width,
            bias=True,
            scale=None if scaled else 1.0,
            scale_by_layer=by_layer,
        ),
        mlp=MlpConfig(fields.integer("n_inner", 4 * width, null=4 * width), activation, bias=True),
        position="learned",
        max_length=fields.integer("n_positions"),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0),
        norm_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.part("attention").num_heads,
        "n_inner": config.part("mlp").width,
        "scale_attn_weights": config.part("attention").scale != 1,
        "scale_attn_by_inverse_layer_idx": config.part("attention").scale_by_layer,
        "activation_function": _write_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


# Conv1D has weights [in, out]; query, key and value are concatenated
_GPT2_ROWS = (
    Row("transformer.wte.weight", "v d -> v d", ("embedding/table",)),
    Row("transformer.wpe.weight", "t d -> t d", ("positions/table",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    *affine("transformer.ln_f", "final_norm"),
    *affine("transformer.h.{l}.ln_1", "mixer_norm"),
    *affine("transformer.h.{l}.ln_2", "mlp_norm"),
    Row(
        "transformer.h.{l}.attn.c_attn.weight",
        "d (s c) -> d s c",
        parts("mixer", "weight", "query", "key", "value"),
        join=1,
    ),
    Row(
        "transformer.h.{l}.attn.c_attn.bias",
        "(s c) -> s c",
        parts("mixer", "bias", "query", "key", "value"),
    ),
    Row("transformer.h.{l}.attn.c_proj.weight", "(h c) d -> h c d", ("mixer/out/weight",)),
    Row("transformer.h.{l}.attn.c_proj.bias", "d -> d", ("mixer/out/bias",)),
    Row("transformer.h.{l}.mlp.c_fc.weight", "d f -> d f", ("mlp/up/weight",)),
    Row("transformer.h.{l}.mlp.c_fc.bias", "f -> f", ("mlp/up/bias",)),
    Row("transformer.h.{l}.mlp.c_proj.weight", "f d -> f d", ("mlp/down/weight",)),
    Row("transformer.h.{l}.mlp.c_proj.bias", "d -> d", ("mlp/down/bias",)),
)


def _read_neox(fields: Fields) -> DecoderConfig:
    width, bias = fields.integer("hidden_size"), fields.flag("attention_bias", True)
    parallel = fields.flag("use_parallel_residual", True)
    rotary = read_rotary(
        fields, theta_name="rotary_emb_base", fraction_name="rotary_pct", fraction=0.25
    )
    # transformers does not read these outside rope_parameters
    fields.only(rope_theta=rotary.base, partial_rotary_factor=rotary.fraction)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=read_layers(fields),
        attention=heads_of_width(fields.integer("num_attention_heads"), width, bias),
        mlp=MlpConfig(
            fields.integer("intermediate_size"),
            _read_activation(fields, "hidden_act", "gelu"),
            bias=True,
        ),
        rotary=rotary,
        norm="layernorm",
        norm_eps=fields.number("layer_norm_eps", 1e-5, above=0),
        norm_bias=True,
        parallel_residual=parallel,
        shared_norm=not parallel,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_length=fields.integer("max_position_embeddings", None),
    )


def _write_neox(config: DecoderConfig) -> dict[str, Any]:
    # the fraction is always written: GPT-NeoX's default is a quarter
    fraction = {"partial_rotary_factor": config.rotary.fraction}
    written = write_rotary(config.rotary)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.part("attention").num_heads,
        "intermediate_size": config.part("mlp").width,
        "hidden_act": _write_activation(config),
        "attention_bias": config.part("attention").qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.rotary.fraction,
        "rotary_emb_base": config.rotary.base,
        **{
            name: {**value, **fraction} if isinstance(value, dict) else value
            for name, value in written.items()
        },
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length or 2048,
    }


def _fused_by_head(layer: str, attention: str, mlp: tuple[str, str]) -> tuple[Row, ...]:
    """Rows of layers whose fused tensor is ordered by head, then query, key, value."""
    up, down = (f"{layer}.mlp.{name}" for name in mlp)
    fused = f"{layer}.{attention}.query_key_value"
    names = ("query", "key", "value")
    return (
        *affine(f"{layer}.input_layernorm", "mixer_norm"),
        *affine(f"{layer}.post_attention_layernorm", "mlp_norm"),
        Row(f"{fused}.weight", "(h n c) d -> d (n h) c", parts("mixer", "weight", *names), join=1),
        Row(f"{fused}.bias", "(h n c) -> (n h) c", parts("mixer", "bias", *names)),
        Row(f"{layer}.{attention}.dense.weight", "d (h c) -> h c d", ("mixer/out/weight",)),
        Row(f"{layer}.{attention}.dense.bias", "d -> d", ("mixer/out/bias",)),
        Row(f"{up}.weight", "f d -> d f", ("mlp/up/weight",)),
        Row(f"{up}.bias", "f -> f", ("mlp/up/bias",)),
        Row(f"{down}.weight", "d f -> f d", ("mlp/down/weight",)),
        Row(f"{down}.bias", "d -> d", ("mlp/down/bias",)),
    )


_HIDDEN = ("dense_h_to_4h", "dense_4h_to_h")
_NEOX_ROWS = (
    Row("gpt_neox.embed_in.weight", "v d -> v d", ("embedding/table",)),
    Row("embed_out.weight", "v d -> d v", ("head/weight",)),
    *affine("gpt_neox.final_layer_norm", "final_norm"),
    *_fused_by_head("gpt_neox.layers.{l}", "attention", _HIDDEN),
)


def _read_bloom(fields: Fields) -> DecoderConfig:
    fields.only(apply_residual_connection_post_layernorm=False)
    # both names are on the Hub, the second one in the largest model
    names = (("n_embed", "hidden_size"), ("n_head", "num_attention_heads"))
    width, heads = (_either(fields, *pair) for pair in names)
    layers = _either(fields, "n_layer", "num_hidden_layers", at_most=MOST_LAYERS)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=layers,
        attention=heads_of_width(heads, width, bias=True),
        mlp=MlpConfig(4 * width, "gelu_tanh", bias=True),
        position="alibi",
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0),
        norm_bias=True,
        embedding_norm=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _either(fields: Fields, name: str, other: str, **limits: int) -> int:
    """The integer with one of two names, or with both."""
    fields.same(name, other)
    return fields.integer(name if name in fields else other, **limits)


def _write_bloom(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "n_layer": config.num_layers,
        "n_head": config.part("attention").num_heads,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


_BLOOM_ROWS = (
    Row("transformer.word_embeddings.weight", "v d -> v d", ("embedding/table",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    *affine("transformer.word_embeddings_layernorm", "embedding_norm"),
    *affine("transformer.ln_f", "final_norm"),
    *_fused_by_head("transformer.h.{l}", "self_attention", _HIDDEN),
)


SAME = "computes the same function in another way"
_GPT2_UNUSED = {
    "n_ctx": "n_positions, in older files",
    "reorder_and_upcast_attn": SAME,
    **dict.fromkeys(
        (
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ),
        "for another task than the next token",
    ),
}
_BLOOM_UNUSED = {
    **dict.fromkeys(
        ("slow_but_exact", "masked_softmax_fusion", "bias_dropout_fusion", "skip_bias_add",
         "skip_bias_add_qkv", "attention_softmax_in_fp32"),
        SAME,
    ),
    "seq_length": "the length in training; ALiBi has no limit",
    "offset_alibi": "of the authors' own code",
    "n_inner": "transformers reads the width alone",
}  # fmt: skip

GPTS = (
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        _read_gpt2,
        _write_gpt2,
        _GPT2_ROWS,
        prefix="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
        unused=_GPT2_UNUSED,
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _read_neox,
        _write_neox,
        _NEOX_ROWS,
        prefix="gpt_neox.",
        ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
        renamed={"lm_head.weight": "embed_out.weight"},
    ),
    Family(
        "BloomForCausalLM",
        "bloom",
        _read_bloom,
        _write_bloom,
        _BLOOM_ROWS,
        prefix="transformer.",
        unused=_BLOOM_UNUSED,
    ),
)
