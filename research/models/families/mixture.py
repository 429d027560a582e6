"""Mixtures of experts: Mixtral, and DeepSeek-V3 with its latent attention."""

import dataclasses
import math
from typing import Any

from layers.decoder import DecoderConfig
from layers.latent_attention import LatentConfig
from layers.mlp import MlpConfig
from layers.rotary import yarn_growth
from layers.routing import MoeConfig
from research.models.families.family import (
    Family,
    parts,
    read_layers,
    shortest,
)
from research.models.families.llama import (
    BIASES,
    LAYER,
    MLP_ROWS,
    MODEL_ROWS,
    OUT_ROWS,
    PRE_NORM_ROWS,
    PROJECTION_ROWS,
    read_windowed,
    write_windowed,
)
from research.models.families.rotary import read_mscale, read_rotary, rope_fields, write_rotary
from research.models.fields import Fields
from research.models.table import Row


def _read_mixtral(fields: Fields) -> DecoderConfig:
    config = read_windowed(fields, rotary=read_rotary(fields, theta=1e6), eps=1e-5)
    top_k = fields.integer("num_experts_per_tok", 2)
    weight = fields.number("router_aux_loss_coef", 0.001, at_least=0)
    moe = MoeConfig(
        fields.integer("num_local_experts", 8),
        config.part("mlp").width,
        top_k=top_k,
        router="choice_softmax",
        balance_weight=weight * _balance_sums(top_k, config.num_layers),
        jitter=fields.number("router_jitter_noise", 0.0, at_least=0, below=1),
    )
    return dataclasses.replace(config, mlp=None, moe=moe, feed_forward=("moe",))


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    moe = config.part("moe")
    # the experts' width has the field name of a Llama's hidden layer
    written = write_windowed(dataclasses.replace(config, mlp=MlpConfig(moe.width)))
    weight = moe.balance_weight / _balance_sums(moe.top_k, config.num_layers)
    return {
        **written,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        # without the rounding error of the product
        "router_aux_loss_coef": float(f"{weight:.12g}"),
        "router_jitter_noise": moe.jitter,
    }


def _balance_sums(top_k: int, layers: int) -> float:
    """The balance loss of transformers, in units of the sum of ours over layers.

    Loads that are even have a loss of ``top_k`` there, in the mean of all layers, and here of 1 in
    each layer.
    """
    return top_k / layers


def _read_deepseek(fields: Fields) -> DecoderConfig:
    fields.only(hidden_act="silu", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", heads, null=heads) != heads:
        fields.only(num_key_value_heads=heads)
    rotary = read_rotary(fields)
    channels = fields.integer("qk_nope_head_dim")
    rotary_channels = fields.integer("qk_rope_head_dim")
    # transformers derives it, and takes another value from the file if there is one
    fields.only(head_dim=rotary_channels)
    growth = 1.0
    if rotary.scaling is not None:
        growth = yarn_growth(rotary.scaling.factor, read_mscale(rope_fields(fields)))
    layers = read_layers(fields)
    dense = min(fields.integer("first_k_dense_replace", 3, at_least=0), layers)
    feed_forward = shortest(("mlp",) * dense + ("moe",) * (layers - dense))
    interleaved = fields.flag("rope_interleave", True)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        num_layers=layers,
        latent=LatentConfig(
            heads,
            rank=fields.integer("kv_lora_rank"),
            head_dim=channels,
            rotary_dim=rotary_channels,
            value_dim=fields.integer("v_head_dim"),
            query_rank=fields.integer("q_lora_rank", 1536, null=None),
            bias=fields.flag("attention_bias", False),
            scale=(channels + rotary_channels) ** -0.5 * growth * growth,
            # fixed: it does not follow rms_norm_eps
            norm_eps=1e-6,
        ),
        mlp=MlpConfig(fields.integer("intermediate_size")),
        moe=MoeConfig(
            fields.integer("n_routed_experts"),
            fields.integer("moe_intermediate_size"),
            top_k=fields.integer("num_experts_per_tok", 8),
            router="sigmoid",
            normalize=fields.flag("norm_topk_prob", True),
            scale=fields.number("routed_scaling_factor", 2.5, above=0),
            groups=fields.integer("n_group", 8),
            top_groups=fields.integer("topk_group", 4),
            shared_experts=fields.integer("n_shared_experts", 1, at_least=0),
            balance_weight=fields.number("aux_loss_alpha", 0.0, at_least=0),
        ),
        pattern=("latent",) * len(feed_forward),
        feed_forward=feed_forward,
        rotary=dataclasses.replace(rotary, interleaved=interleaved),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_length=fields.integer("max_position_embeddings", None),
    )


def _write_deepseek(config: DecoderConfig) -> dict[str, Any]:
    latent, moe = config.part("latent"), config.part("moe")
    kinds = config.feed_forward * (config.num_layers // len(config.feed_forward))
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": latent.num_heads,
        "num_key_value_heads": latent.num_heads,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank,
        "qk_nope_head_dim": latent.head_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "attention_bias": latent.bias,
        # config.json has this field even if no layer is dense
        "intermediate_size": moe.width if config.mlp is None else config.mlp.width,
        "moe_intermediate_size": moe.width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.scale,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "aux_loss_alpha": moe.balance_weight,
        "first_k_dense_replace": (*kinds, "moe").index("moe"),
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **_write_scaled_rotary(config),
        "rope_interleave": config.rotary.interleaved,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length or 4096,
    }


def _write_scaled_rotary(config: DecoderConfig) -> dict[str, Any]:
    """`write_rotary`; the factor of the whole score is written as YaRN's temperature."""
    latent, scaling = config.part("latent"), config.rotary.scaling
    written = write_rotary(config.rotary)
    if scaling is None or latent.scale is None:
        return written
    growth = math.sqrt(latent.scale * math.sqrt(latent.head_dim + latent.rotary_dim))
    if math.isclose(growth, 1):
        return written
    weight = round((growth - 1) / (yarn_growth(scaling.factor) - 1), 9)
    rope = {**written["rope_parameters"], "mscale_all_dim": weight}
    if scaling.magnitude == 1:
        # as in DeepSeek's files: only the quotient of the two has an effect
        del rope["attention_factor"]
        rope["mscale"] = weight
    return {**written, "rope_parameters": rope, "rope_scaling": rope}


def _expert_rows(layer: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of a layer's router and experts."""
    return (
        Row(layer + "gate.weight", "e d -> d e", ("mlp/router/weight",)),
        Row(f"{layer}experts.{{e}}.{gate}.weight", "f d -> d f", ("mlp/gate",)),
        Row(f"{layer}experts.{{e}}.{up}.weight", "f d -> d f", ("mlp/up",)),
        Row(f"{layer}experts.{{e}}.{down}.weight", "d f -> f d", ("mlp/down",)),
    )


_MIXTRAL_ROWS = (
    *MODEL_ROWS,
    *PRE_NORM_ROWS,
    *PROJECTION_ROWS,
    *OUT_ROWS,
    *_expert_rows(LAYER + "block_sparse_moe.", "w1", "w3", "w2"),
)
_MLA = LAYER + "self_attn."
_SHARED = LAYER + "mlp.shared_experts."
_DEEPSEEK_ROWS = (
    *MODEL_ROWS,
    *PRE_NORM_ROWS,
    Row(_MLA + "q_proj.weight", "(h c) d -> d h c", ("mixer/query/weight",)),
    Row(_MLA + "q_a_proj.weight", "r d -> d r", ("mixer/query_down/weight",)),
    Row(_MLA + "q_a_proj.bias", "r -> r", ("mixer/query_down/bias",)),
    Row(_MLA + "q_a_layernorm.weight", "r -> r", ("mixer/query_norm/scale",)),
    Row(_MLA + "q_b_proj.weight", "(h c) r -> r h c", ("mixer/query_up/weight",)),
    Row(
        _MLA + "kv_a_proj_with_mqa.weight",
        "r d -> d r",
        parts("mixer", "weight", "latent_down", "rotary_key"),
        join=1,
    ),
    Row(
        _MLA + "kv_a_proj_with_mqa.bias",
        "r -> r",
        parts("mixer", "bias", "latent_down", "rotary_key"),
    ),
    Row(_MLA + "kv_a_layernorm.weight", "r -> r", ("mixer/latent_norm/scale",)),
    Row(
        _MLA + "kv_b_proj.weight",
        "(h c) r -> r h c",
        parts("mixer", "weight", "key", "value"),
        join=2,
    ),
    *OUT_ROWS,
    *MLP_ROWS,
    *_expert_rows(LAYER + "mlp.", "gate_proj", "up_proj", "down_proj"),
    Row(LAYER + "mlp.gate.e_score_correction_bias", "e -> e", ("mlp/bias",)),
    Row(_SHARED + "gate_proj.weight", "f d -> d f", ("mlp/shared/gate/weight",)),
    Row(_SHARED + "up_proj.weight", "f d -> d f", ("mlp/shared/up/weight",)),
    Row(_SHARED + "down_proj.weight", "d f -> f d", ("mlp/shared/down/weight",)),
)

_DEEPSEEK_UNUSED = {
    "qk_head_dim": "transformers derives it from the other two",
    "num_nextn_predict_layers": "layers that predict further tokens are not loaded",
    "num_mtp_layers": "the same",
    "ep_size": "how many devices the experts were sharded over",
}

MIXTURES = (
    Family(
        "MixtralForCausalLM",
        "mixtral",
        _read_mixtral,
        _write_mixtral,
        _MIXTRAL_ROWS,
        unused=BIASES,
    ),
    Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        _read_deepseek,
        _write_deepseek,
        _DEEPSEEK_ROWS,
        beyond="model.layers.",
        unused=_DEEPSEEK_UNUSED,
    ),
)
