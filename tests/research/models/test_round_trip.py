"""What is read is what was written: any configuration, dtype, naming and mesh."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from layers.decoder import Decoder
from layers.weights import flat
from research.models import FAMILIES, decoder_config, load, save
from tests.research.models.conftest import CASES, TOKENS, assert_same, logits_of, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@st.composite
def tiny(draw, family):
    """A config.json of ``family``; what a family does not have is not read."""
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, channels = kv_heads * groups, draw(st.sampled_from([2, 4]))
    layers = draw(st.integers(1, 3))
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    bias = draw(st.booleans())
    own_width = family in ("gpt2", "gpt_neox", "bloom", "mpt", "rwkv7")
    width = heads * channels if own_width else 6
    listed = family in ("qwen2", "qwen3", "gemma2", "gemma3_text")
    partial = channels == 4 and family in ("phi3", "gpt_neox")
    scaled = family in ("llama", "mixtral", "deepseek_v3")
    heads_kept = heads if family == "deepseek_v3" else kv_heads
    return dict(
        architectures=[FAMILIES[family].architecture],
        vocab_size=11,
        tie_word_embeddings=family != "rwkv7" and draw(st.booleans()),
        **dict.fromkeys(("hidden_size", "n_embd", "d_model"), width),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), layers),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), heads),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 8),
        context_length=8,
        num_key_value_heads=heads_kept,
        head_dim=2 if family == "deepseek_v3" else channels,
        intermediate_size=2 * width if family == "mamba" else draw(st.sampled_from([4, 6])),
        num_local_experts=draw(st.integers(2, 3)),
        num_experts_per_tok=draw(st.integers(1, 2)),
        n_routed_experts=4,
        n_group=groups,
        topk_group=1,
        n_shared_experts=draw(st.integers(0, 2)),
        moe_intermediate_size=draw(st.integers(1, 3)),
        first_k_dense_replace=draw(st.integers(0, 3)),
        kv_lora_rank=draw(st.integers(1, 3)),
        q_lora_rank=draw(st.sampled_from([None, 2])),
        qk_nope_head_dim=channels,
        qk_rope_head_dim=2,
        v_head_dim=draw(st.integers(1, 3)),
        rope_interleave=bias,
        state_size=draw(st.integers(1, 3)),
        conv_kernel=draw(st.integers(1, 3)),
        n_groups=draw(st.sampled_from([1, 3])),
        time_step_limit=draw(st.sampled_from([[0.0, math.inf], [0.5, math.inf], [0, 0.1]])),
        attention_hidden_size=draw(st.sampled_from([None, 5])),
        rescale_every=draw(st.integers(-1, 2)),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        no_bias=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([None, 0.5, "inv_sqrt_d_model"])),
        attn_config=dict(
            alibi=draw(st.booleans()), qk_ln=draw(st.booleans()),
            clip_qkv=draw(st.sampled_from([None, 6])), alibi_bias_max=draw(st.integers(1, 16)),
        ),
        num_heads=12 // channels,
        **{f"{low}_rank": draw(st.integers(1, 3)) for low in ("decay", "rate", "value", "gate")},
        use_bias=bias,
        use_conv_bias=draw(st.booleans()),
        attention_bias=bias,
        mlp_bias=bias,
        use_parallel_residual=bias,
        **dict.fromkeys(
            ("partial_rotary_factor", "rotary_pct"),
            draw(st.sampled_from([0.5, 1.0])) if partial else 1.0,
        ),
        **(dict(rope_scaling=dict(
            rope_type="yarn", factor=draw(st.sampled_from([2.0, 40.0])),
            original_max_position_embeddings=8, mscale=draw(st.sampled_from([0.5, 1.0])),
            mscale_all_dim=draw(st.sampled_from([0.0, 0.707, 1.0])),
        )) if scaled and draw(st.booleans()) else {}),
        **dict.fromkeys(("rope_theta", "rotary_emb_base"), draw(st.sampled_from([1e4, 5e5]))),
        use_sliding_window=True,
        sliding_window=draw(st.integers(1, 9)),
        query_pre_attn_scalar=draw(st.integers(1, 300)),
        **(dict(layer_types=draw(st.lists(kinds, min_size=layers, max_size=layers)))
           if listed else {}),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), shard_bytes=st.integers(1, 5000))
def test_any_small_model_survives_the_round_trip(family, data, shard_bytes, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fields of other families
        config = decoder_config(data.draw(tiny(family)))
    rng = np.random.default_rng(0)
    # shapes alone: nothing is initialised, nothing computed
    model = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))),
    )
    out = tmp_path_factory.mktemp("round") / "trip"
    save(model, out, family, shard_bytes=shard_bytes)
    again = load(out)
    assert again.config == config
    for (path, before), after in zip(flat(model).items(), flat(again).values(), strict=True):
        np.testing.assert_array_equal(before, after, err_msg=path)


def test_bfloat16_is_read_and_kept(tmp_path):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype("bfloat16")}
    save(ours, tmp_path / "out", "llama")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("name", ["deepseek", "mamba", "mamba2", "rwkv", "mixtral"])
def test_what_is_kept_in_float32_stays_float32(name, tmp_path):
    """A checkpoint in bfloat16, but for what transformers or the authors keep in float32."""
    kind, fields = CASES[name]
    kept = {
        "deepseek": ("mlp.gate.weight", "e_score_correction_bias"),
        "mamba": ("A_log", "mixer.D"),
        "mamba2": ("A_log", "mixer.D"),
        "rwkv": ("time_decay", "time_first"),
        "mixtral": ("gate.weight",),
    }[name]
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = {
        name: tensor if name.endswith(kept) else tensor.astype(jnp.bfloat16)
        for name, tensor in load_file(path).items()
    }
    assert any(tensor.dtype == np.float32 for tensor in tensors.values())
    save_file(tensors, path)
    ours = load(tmp_path / "in", param_dtype="bfloat16")
    save(ours, tmp_path / "out", theirs.config.model_type)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for tensor_name, tensor in tensors.items():
        assert written[tensor_name].dtype == tensor.dtype, tensor_name
        np.testing.assert_array_equal(written[tensor_name], tensor, err_msg=tensor_name)
    if name == "deepseek":
        again = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        gates = [t for n, t in again.state_dict().items() if n.endswith(kept)]
        assert gates and {gate.dtype for gate in gates} == {torch.float32}


def test_a_bare_gpt2_without_prefix_or_head_is_read(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    tensors.pop("lm_head.weight", None)
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(tensors, path)
    bare = load(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same(bare, load(tmp_path))


def test_gpt_neox_is_read_under_either_name_of_its_head(tmp_path):
    make("gpt_neox").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, models = load_file(path), []
    [head] = [tensors.pop(n) for n in ("embed_out.weight", "lm_head.weight") if n in tensors]
    for name in ("embed_out.weight", "lm_head.weight"):
        save_file({**tensors, name: head}, path)
        models.append(load(tmp_path))
    assert_same(*models)


def test_sharded_over_8_devices_it_is_the_same_and_rests_where_the_table_says(run_script, tmp_path):
    meshes = {
        "olmo2": dict(data=2, fsdp=2, tensor=2),  # its norms span heads on different devices
        "deepseek": dict(data=1, fsdp=2, expert=2, tensor=2),
        "mamba": dict(data=2, fsdp=2, tensor=2),
    }
    for name in meshes:
        theirs = make(name)
        theirs.save_pretrained(tmp_path / name)
        np.save(tmp_path / f"{name}.npy", logits_of(theirs))
    np.save(tmp_path / "tokens.npy", TOKENS)
    run_script(f"""
import json, weakref
from pathlib import Path
import jax, numpy as np
from safetensors.numpy import load_file
from research.models import load, save
from research.models.reader import Reader
from research.parallel import MeshConfig, make_mesh, shard_batch, shardings, use_mesh

# never more than one tensor on the host at a time
held, read = [], Reader.read
def counted(self, name):
    # what is not stacked over layers is itself the destination
    assert all(other() is None for name, other in held if "layers" in name), name
    tensor = read(self, name)
    view = tensor.view(type("Tracked", (np.ndarray,), {{}}))
    held.append((name, weakref.ref(view)))
    return view
Reader.read = counted
folder = Path({str(tmp_path)!r})
tokens = np.repeat(np.load(folder / "tokens.npy"), 4, axis=0).astype(np.int32)
for name, sizes in {meshes!r}.items():
    mesh = make_mesh(MeshConfig(**sizes))
    model = load(folder / name, mesh=mesh)
    for leaf, want in zip(jax.tree.leaves(model), jax.tree.leaves(shardings(model, mesh))):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (leaf.shape, leaf.sharding, want)
    assert len(held) > 10
    held.clear()
    with use_mesh(mesh):
        batch = shard_batch({{"tokens": tokens}}, mesh)
        got = jax.jit(lambda m, x: m(x).logits_btv)(model, batch["tokens"])
    want = np.repeat(np.load(folder / (name + ".npy")), 4, axis=0)
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5, rtol=1e-5, err_msg=name)
    kind = json.loads((folder / name / "config.json").read_text())["model_type"]
    save(model, folder / "again" / name, kind)
    a, b = (load_file(folder / where / name / "model.safetensors") for where in (".", "again"))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
""")
