"""A feature that a family does not support is refused, by the name of its field."""

import pytest

from layers.config import ConfigError
from research.models import FAMILIES, decoder_config


@pytest.mark.filterwarnings("ignore:config.json")  # fields of other families
@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("gpt2", dict(scale_attn_weights=None), "scale_attn_weights=None: must not be null"),
        ("gpt2", dict(activation_function="swish"), "activation_function='swish': must be one of"),
        ("bloom", dict(apply_residual_connection_post_layernorm=True), "must be false"),
        ("bloom", dict(n_head=5, num_attention_heads=5), "heads=5: must divide the width 12"),
        ("mpt", dict(n_heads=5), "heads=5: must divide the width 12"),
        ("mpt", dict(attn_config=dict(clip_qkv=-6)), "attn_config.clip_qkv=-6: must be > 0"),
        ("mpt", dict(attn_config=dict(alibi_bias_max=0)), "alibi_bias_max=0: must be > 0"),
        ("mpt", dict(attn_config=dict(rope=True)), "attn_config.rope=True: must be false"),
        ("mpt", dict(attn_config=dict(attn_type="multiquery_attention")),
         "attn_type='multiquery_attention': must be multihead_attention"),
        ("mpt", dict(logit_scale="sqrt"), "logit_scale='sqrt': must be a number"),
        ("rwkv", dict(layer_norm_epsilon=0), "layer_norm_epsilon=0: must be > 0"),
        ("gemma2", dict(use_bidirectional_attention=True), "must be false"),
        ("gemma3_text", dict(layer_types=["chunked_attention"]),
         r"layer_types\[0\]='chunked_attention': must be one of full_attention, sliding"),
        # transformers reads these two from other places than for a single table
        *(
            ("gemma3_text", dict(outside, rope_parameters=dict(beside, full_attention=dict(
                inside, rope_type="yarn", factor=2.0))), message)
            for inside, beside, outside, message in (
                (dict(truncate=False), {}, {}, "full_attention.truncate=False: must be true"),
                ({}, dict(truncate=False), {}, "rope_parameters.truncate=False: must be true"),
                ({}, {}, dict(original_max_position_embeddings=8), "embeddings=8: must be null"),
            )
        ),
        ("qwen2", dict(layer_types=["sliding_attention"]), "layer_types="),
        ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)),
         "rope_scaling.type='linear': must be one of default, longrope, su"),
        *(
            (family, dict(max_position_embeddings=16, rope_scaling=dict(
                dict(type="longrope", short_factor=[1.0], long_factor=[2.0],
                     original_max_position_embeddings=8), **change)), message)
            for family, change, message in (
                ("llama", {}, "number of short_factors=1: must have 3, one for each pair"),
                ("llama", dict(long_factor=[1, 2, 3]), "must be as many as long_factors"),
                ("llama", dict(long_factor=["1"]),
                 r"rope_scaling.long_factor\[0\]='1': must be a finite number > 0"),
                ("llama", dict(long_factor=[10**400]),
                 r"rope_scaling.long_factor\[0\]=1000.*000: must be a finite number > 0"),
                ("llama", dict(short_factor=None), "rope_scaling.short_factor=None: must not be"),
                # transformers' default outside of the object precedes what is inside
                ("phi3", {}, "original_max_position_embeddings=8: must be 4096, that outside of"),
            )
        ),
        ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)),
         "max_position_embeddings: is missing"),
        ("llama", dict(max_position_embeddings=8, rope_scaling=dict(type="dynamic", factor=0.5)),
         "rope_scaling.factor=0.5: must be ≥ 1"),
        ("llama", dict(rope_scaling=dict(type="linear")), "rope_scaling.factor: is missing"),
        ("qwen3", dict(rope_scaling=dict(type="yarn", factor=2.0)),
         "original_max_position_embeddings: is missing"),
        ("qwen3", dict(rope_scaling=dict(type="yarn", original_max_position_embeddings=8)),
         "rope_scaling.factor: is missing"),
        ("qwen3", dict(max_position_embeddings=8,
                       rope_scaling=dict(type="yarn", factor=2.0, truncate=0)),
         "rope_scaling.truncate=0: must be true or false"),
        ("mixtral", dict(hidden_act="gelu"), "hidden_act='gelu': must be silu"),
        ("mixtral", dict(num_experts_per_tok=9), "top_k=9: must be in 1 … num_experts=8"),
        ("deepseek_v3", dict(num_key_value_heads=1), "num_key_value_heads=1: must be 2"),
        *(
            ("deepseek_v3", dict(quantization_config=dict(
                dict(quant_method="fp8", weight_block_size=[128, 128]), **change)), message)
            for change, message in (
                (dict(quant_method="gptq"), "quant_method='gptq': must be .*fp8"),
                (dict(fmt="e5m2"), "quantization_config.fmt='e5m2': must be .*e4m3"),
                (dict(weight_block_size=[128]), r"weight_block_size=\[128\]: must be two integers"),
                (dict(weight_block_size=None), "weight_block_size=None: must not be null"),
            )
        ),
        ("deepseek_v3", dict(topk_method="greedy"), "topk_method='greedy': must be noaux_tc"),
        ("deepseek_v3", dict(n_group=16), "groups=16: must divide num_experts=8"),
        ("mamba", dict(hidden_act="gelu"), "hidden_act='gelu': must be silu"),
        ("mamba", dict(intermediate_size=20), "intermediate_size=20: must be 24"),
        ("mamba2", dict(time_step_limit=[0.2, 0.1]),
         r"time_step_limit=\[0.2, 0.1\]: must be \[low, high\] with 0 ≤ low < high"),
        ("mamba2", dict(time_step_limit=[0, 10**400]), "time_step_limit=.*: must be .low"),
        ("mamba2", dict(time_step_limit=[False, 1]), "time_step_limit=.*: must be .low"),
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
        moe_intermediate_size=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=6,
        v_head_dim=4, n_group=1, topk_group=1, n_groups=2, num_heads=4, head_dim=6,
    )  # fmt: skip
    hf = {"architectures": [FAMILIES[family].architecture], **sizes}
    decoder_config(hf)
    with pytest.raises(ConfigError, match=message) as raised:
        decoder_config({**hf, **fields})
    assert "\n" not in str(raised.value)
