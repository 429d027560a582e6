"""Small transformers models of every family, random throughout."""

import json
import os

import jax
import numpy as np
import pytest

from layers.weights import flat

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 19))
LLAMA = dict(
    vocab_size=62, max_position_embeddings=64, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)  # fmt: skip
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GEMMA = dict(
    LLAMA, head_dim=6, query_pre_attn_scalar=9, sliding_window=5, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=62, n_positions=64, n_embd=16, n_layer=2, n_head=4, eos_token_id=None,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
ENDLESS = dict(bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
# every prompt of the tests is longer than the original length, so that transformers takes the long
# factors for all tokens
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75,
    short_factor=[1.0, 1.1, 1.2], long_factor=[1.5, 2.5, 7.0], original_max_position_embeddings=8,
)  # fmt: skip
DEEPSEEK = dict(
    LLAMA, num_key_value_heads=4, first_k_dense_replace=1,
    moe_intermediate_size=12, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
    n_group=4, topk_group=2, kv_lora_rank=10, q_lora_rank=7, qk_nope_head_dim=4,
    qk_rope_head_dim=8, v_head_dim=6,
)  # fmt: skip
# name → (prefix of transformers' classes, fields)
CASES = {
    "llama": ("Llama", LLAMA),
    "llama_biased_tied": (
        "Llama",
        dict(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=8),
    ),
    "llama_scaled": ("Llama", dict(LLAMA, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=None)),
    "mistral_window": ("Mistral", dict(LLAMA, sliding_window=7)),
    "qwen2": ("Qwen2", dict(LLAMA, tie_word_embeddings=True)),
    "qwen2_window": (
        "Qwen2",
        dict(
            LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1,
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4),
        ),
    ),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=6)),
    "olmo2": ("Olmo2", LLAMA),
    "phi3": ("Phi3", dict(LLAMA, sliding_window=6, pad_token_id=0)),
    "phi3_partial": (
        "Phi3",
        dict(
            LLAMA, pad_token_id=0, hidden_size=32, original_max_position_embeddings=8,
            rope_parameters=LONGROPE,
        ),
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": (
        "Gemma3Text",
        dict(
            GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None, num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
    "mixtral": ("Mixtral", dict(LLAMA, num_local_experts=4, sliding_window=None)),
    "mixtral_window": (
        "Mixtral",
        dict(
            LLAMA, num_local_experts=5, num_experts_per_tok=3, sliding_window=6, head_dim=8,
            rope_parameters=dict(YARN, truncate=False, beta_slow=0.1),
        ),
    ),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek_yarn": (
        "DeepseekV3",
        dict(
            DEEPSEEK, q_lora_rank=None, rms_norm_eps=0.1, rope_interleave=False,
            norm_topk_prob=False,
            first_k_dense_replace=0, attention_bias=True, routed_scaling_factor=0.7, n_group=1,
            topk_group=1, rope_parameters=dict(YARN, beta_fast=8, mscale=0.5, mscale_all_dim=0.7),
        ),
    ),
    "mamba": ("Mamba", dict(vocab_size=62, hidden_size=16, num_hidden_layers=2, **ENDLESS)),
    "mamba_biased": (
        "Mamba",
        dict(
            vocab_size=62, hidden_size=20, num_hidden_layers=2, use_bias=True, use_conv_bias=False,
            state_size=5, time_step_rank=3, conv_kernel=3, expand=3, tie_word_embeddings=False,
            **ENDLESS,
        ),
    ),
    "mamba2": (
        "Mamba2",
        dict(
            vocab_size=62, hidden_size=16, num_hidden_layers=2, num_heads=8, head_dim=4, n_groups=4,
            state_size=5, tie_word_embeddings=True, use_bias=True, pad_token_id=None,
            # one token at a time, transformers does not apply the limit
            time_step_limit=(0.6, 0.8), use_cache=False,
            **ENDLESS,
        ),
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": (
        "GPT2",
        dict(
            GPT2, n_inner=40, activation_function="relu", tie_word_embeddings=False,
            scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False,
        ),
    ),
    "gpt_neox": (
        "GPTNeoX",
        dict(
            NEOX, hidden_size=32,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25
            ),
        ),
    ),
    "gpt_neox_sequential": (
        "GPTNeoX", dict(NEOX, hidden_size=32, use_parallel_residual=False, attention_bias=False),
    ),
    "bloom": ("Bloom", dict(vocab_size=62, hidden_size=24, n_layer=2, n_head=6, **ENDLESS)),
    "mpt": (
        "Mpt",
        dict(
            vocab_size=62, d_model=24, n_layers=2, n_heads=6, **ENDLESS,
            attn_config=dict(clip_qkv=0.5, softmax_scale=0.7),
        ),
    ),
    "rwkv": (
        "Rwkv",
        dict(
            vocab_size=62, hidden_size=16, num_hidden_layers=3, attention_hidden_size=12,
            # transformers has no state of other sizes than hidden_size
            layer_norm_epsilon=1e-2, rescale_every=1, use_cache=False, **ENDLESS,
        ),
    ),
}  # fmt: skip


def transformers_model(kind, **fields):
    """A new model of transformers, with its own initial weights."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make(name, seed=0):
    """A random transformers model; biases and norms are not left at 0 and 1."""
    torch = pytest.importorskip("torch")
    kind, fields = CASES[name]
    torch.manual_seed(seed)
    model = transformers_model(kind, **fields)
    with torch.no_grad():
        biases = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
        for parameter in (*model.parameters(), *biases):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits_of(theirs, tokens=TOKENS):
    """What transformers computes."""
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(tokens)).logits.numpy()


@jax.jit
def logits(model, tokens):
    """What the Decoder computes; compiled once for all models of one configuration."""
    return model(tokens).logits_btv


def assert_same(one, other):
    """Assert that two Decoders have the same configuration, dtypes and parameters."""
    assert one.config == other.config
    for (name, a), b in zip(flat(one).items(), flat(other).values(), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_close(ours, theirs, tokens=TOKENS):
    """Assert that a Decoder has the logits of a transformers model."""
    np.testing.assert_allclose(
        logits(ours, tokens), logits_of(theirs, tokens), atol=1e-5, rtol=1e-5
    )


def described(directory):
    """The content of its config.json."""
    return json.loads((directory / "config.json").read_text())


def edit(directory, **fields):
    """Change fields of its config.json; ``...`` removes one."""
    hf = {**described(directory), **fields}
    kept = {name: value for name, value in hf.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))


@pytest.fixture(autouse=True, scope="package")
def quick_compiles():
    """These tests compile much and compute little; LLVM's optimisations would be half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
