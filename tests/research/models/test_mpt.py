"""MPT as its authors' code reads it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.models import load, save
from tests.research.models.conftest import ENDLESS, assert_close, assert_same, transformers_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def authors_mpt(alibi):
    """An MPT of transformers, changed to what llm-foundry adds to it; and its fields."""
    fields = dict(vocab_size=62, d_model=16, n_layers=2, n_heads=4, max_seq_len=32, **ENDLESS)
    theirs = transformers_model("Mpt", **fields, no_bias=False)
    mpt, build = theirs.transformer, theirs.transformer.build_mpt_alibi_tensor

    def alibi_tensor(heads, length, **options):
        bias = build(heads, length, alibi_bias_max=5, **options)
        return bias if alibi else torch.zeros_like(bias)

    mpt.build_mpt_alibi_tensor = alibi_tensor
    new = {}

    def parameter(name, module, field, *shape):
        value = torch.nn.Parameter(0.5 * torch.randn(shape))
        module.register_parameter(field, value)
        new[f"transformer.{name}"] = value.detach().numpy()

    class Normed(torch.nn.Module):
        """``Wqkv``, clipped, with LayerNorm of queries and keys over all heads."""

        def __init__(self, linear, layer):
            super().__init__()
            self.linear, self.layer = linear, layer
            for part in ("q_ln", "k_ln"):
                for field in ("weight", "bias"):
                    parameter(f"blocks.{layer}.attn.{part}.{field}", self, f"{part}_{field}", 16)

        def forward(self, x):
            q, k, v = self.linear(x).clamp(-0.8, 0.8).chunk(3, dim=-1)
            norm = torch.nn.functional.layer_norm
            q = norm(q, (16,), self.q_ln_weight, self.q_ln_bias, 1e-5)
            k = norm(k, (16,), self.k_ln_weight, self.k_ln_bias, 1e-5)
            return torch.cat((q, k, v), dim=-1)

    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    parameter("norm_f.bias", mpt.norm_f, "bias", 16)
    for layer, block in enumerate(mpt.blocks):
        parameter(f"blocks.{layer}.norm_1.bias", block.norm_1, "bias", 16)
        parameter(f"blocks.{layer}.norm_2.bias", block.norm_2, "bias", 16)
        parameter(f"blocks.{layer}.attn.Wqkv.bias", block.attn.Wqkv, "bias", 48)
        parameter(f"blocks.{layer}.attn.out_proj.bias", block.attn.out_proj, "bias", 16)
        parameter(f"blocks.{layer}.ffn.up_proj.bias", block.ffn.up_proj, "bias", 64)
        parameter(f"blocks.{layer}.ffn.down_proj.bias", block.ffn.down_proj, "bias", 16)
        block.attn.Wqkv = Normed(block.attn.Wqkv, layer)
    if not alibi:
        parameter("wpe.weight", mpt, "positions", 32, 16)
        mpt.wte.register_forward_hook(lambda _, inputs, y: y + mpt.positions[: y.shape[1]])
    theirs.register_forward_hook(
        lambda _, inputs, output: setattr(output, "logits", 0.25 * output.logits)
    )
    attention = dict(alibi=alibi, alibi_bias_max=5, clip_qkv=0.8, qk_ln=True)
    fields |= dict(
        architectures=["MPTForCausalLM"], model_type="mpt", no_bias=False, attn_config=attention,
        logit_scale="inv_sqrt_d_model", learned_pos_emb=True,
    )  # fmt: skip
    tensors.pop("lm_head.weight", None)
    return theirs, fields, {**tensors, **new}


@pytest.mark.filterwarnings("ignore:no_bias, logit_scale, qk_ln, al.*applied as in the authors")
@pytest.mark.parametrize("alibi", [True, False])
def test_an_mpt_of_its_authors_is_read_with_all_that_transformers_ignores(alibi, tmp_path):
    theirs, fields, tensors = authors_mpt(alibi)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.warns(UserWarning, match="logit_scale, qk_ln, .*transformers does not"):
        ours = load(tmp_path / "in")
    assert_close(ours, theirs)
    save(ours, tmp_path / "out", "mpt")
    assert_same(load(tmp_path / "out"), ours)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
