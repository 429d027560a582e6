"""MPT, as its authors' code (llm-foundry) and transformers read it."""

import warnings
from typing import Any

from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.models.families.family import Family, affine, head_channels, parts, read_layers
from research.models.families.gpt import SAME, heads_of_width
from research.models.families.unused import EVERYWHERE, refuse_other_functions
from research.models.fields import Fields
from research.models.table import Row


def _read_mpt(fields: Fields) -> DecoderConfig:
    attention = fields.object("attn_config")
    refuse_other_functions(attention)
    fields.only(expansion_ratio=4)
    # "low_precision" is that of autocast: the same function
    norms = ("low_precision_layernorm", "layernorm")
    fields.text("norm_type", norms[0], choices=norms)
    attention.only(
        attn_type="multihead_attention",
        prefix_lm=False,
        attn_uses_sequence_id=False,
        rope=False,
        qk_gn=False,
    )
    width, heads = fields.integer("d_model"), fields.integer("n_heads")
    bias = not fields.flag("no_bias", True)
    alibi, learned = attention.flag("alibi", True), fields.flag("learned_pos_emb", True)
    largest = attention.number("alibi_bias_max", 8, above=0)
    position = "alibi" if alibi else "learned" if learned else "none"
    length = fields.integer("max_seq_len", 2048 if position == "learned" else None)
    logit_scale = fields.unused("logit_scale")
    if logit_scale == "inv_sqrt_d_model":
        logit_scale = width**-0.5
    else:
        logit_scale = fields.number("logit_scale", None, above=0)
    qk_norm = attention.flag("qk_ln", False)
    differ = {"no_bias": bias, "logit_scale": logit_scale, "qk_ln": qk_norm, "alibi": not alibi}
    differ |= {"alibi_bias_max": alibi and largest != 8}
    if named := ", ".join(name for name, value in differ.items() if value):
        message = f"{named}: applied as in the authors' code (llm-foundry); transformers does not"
        warnings.warn(message, stacklevel=4)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=read_layers(fields, "n_layers"),
        attention=heads_of_width(
            heads,
            width,
            bias,
            scale=attention.number("softmax_scale", None, above=0),
            alibi_largest=largest if alibi else 8.0,
            clip=attention.number("clip_qkv", None, above=0),
            qk_norm=qk_norm,
            qk_norm_across_heads=qk_norm,
            qk_layernorm=qk_norm,
        ),
        mlp=MlpConfig(4 * width, "gelu", bias),
        position=position,
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0),
        norm_bias=bias,
        logit_scale=logit_scale,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        max_length=length,
    )


def _write_mpt(config: DecoderConfig) -> dict[str, Any]:
    attention = config.part("attention")
    implied = attention.scale is None or attention.scale == head_channels(config) ** -0.5
    alibi = config.position == "alibi"
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "n_layers": config.num_layers,
        "n_heads": attention.num_heads,
        "expansion_ratio": 4,
        "attn_config": {
            "alibi": alibi,
            "alibi_bias_max": _whole(attention.alibi_largest),
            "clip_qkv": attention.clip,
            "qk_ln": attention.qk_norm,
            "softmax_scale": None if implied else attention.scale,
        },
        "no_bias": not attention.qkv_bias,
        "learned_pos_emb": config.position != "none",
        "logit_scale": config.logit_scale,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_seq_len": config.max_length or 2048,
    }


def _whole(number: float) -> float | int:
    """An int if ``number`` is one: transformers requires it."""
    return int(number) if number == int(number) else number


_BLOCK = "transformer.blocks.{l}."
_MPT_ROWS = (
    Row("transformer.wte.weight", "v d -> v d", ("embedding/table",)),
    Row("transformer.wpe.weight", "t d -> t d", ("positions/table",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    *affine("transformer.norm_f", "final_norm"),
    *affine(_BLOCK + "norm_1", "mixer_norm"),
    *affine(_BLOCK + "norm_2", "mlp_norm"),
    Row(
        _BLOCK + "attn.Wqkv.weight",
        "(s c) d -> d s c",
        parts("mixer", "weight", "query", "key", "value"),
        join=1,
    ),
    Row(_BLOCK + "attn.Wqkv.bias", "(s c) -> s c", parts("mixer", "bias", "query", "key", "value")),
    *(
        Row(f"{_BLOCK}attn.{name}_ln.{part}", "(h c) -> h c", (f"mixer/{path}_norm/{ours}",))
        for name, path in (("q", "query"), ("k", "key"))
        for part, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    Row(_BLOCK + "attn.out_proj.weight", "d (h c) -> h c d", ("mixer/out/weight",)),
    Row(_BLOCK + "attn.out_proj.bias", "d -> d", ("mixer/out/bias",)),
    Row(_BLOCK + "ffn.up_proj.weight", "f d -> d f", ("mlp/up/weight",)),
    Row(_BLOCK + "ffn.up_proj.bias", "f -> f", ("mlp/up/bias",)),
    Row(_BLOCK + "ffn.down_proj.weight", "d f -> f d", ("mlp/down/weight",)),
    Row(_BLOCK + "ffn.down_proj.bias", "d -> d", ("mlp/down/bias",)),
)

_MPT_UNUSED = {
    "embedding_fraction": "the gradient of embeddings",
    "init_device": "initial weights, which the checkpoint replaces",
    "init_config": "initial weights, which the checkpoint replaces",
    # transformers writes the object as a configuration of its own
    **{f"attn_config.{name}": why for name, why in EVERYWHERE.items()},
    **dict.fromkeys(("attn_config.architectures", "attn_config.model_type"), "those of the file"),
    "attn_config.attn_impl": SAME,
    "verbose": "of the authors' own code",
}

MPT = Family(
    "MptForCausalLM",
    "mpt",
    _read_mpt,
    _write_mpt,
    _MPT_ROWS,
    prefix="transformer.",
    also=("MPTForCausalLM", "MPTModel"),
    unused=_MPT_UNUSED,
)
