"""Weights in FP8 with a scale for each block."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers.config import ConfigError
from research.models import load, save
from research.models.fp8 import dequantize
from tests.research.models.conftest import assert_close, described, edit, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BLOCK = [4, 3]


def quantized(directory, change=lambda tensors: None):
    """Write FP8 weights in blocks over those of ``directory``, as float64 NumPy computes them."""
    path, tensors, want = directory / "model.safetensors", {}, {}
    for name, weight in load_file(path).items():
        tensors[name] = want[name] = weight
        kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
        if weight.ndim != 2 or any(part in name for part in kept):
            continue
        n, m = weight.shape
        blocks = -(-n // BLOCK[0]), -(-m // BLOCK[1])
        scale = np.empty(blocks, np.float32)
        codes, exact = np.empty((n, m), jnp.float8_e4m3fn), np.empty((n, m))
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                rows = slice(i * BLOCK[0], (i + 1) * BLOCK[0])
                part = rows, slice(j * BLOCK[1], (j + 1) * BLOCK[1])
                scale[i, j] = np.abs(weight[part]).max() / 448
                codes[part] = (weight[part] / scale[i, j]).astype(jnp.float8_e4m3fn)
                exact[part] = codes[part].astype(np.float64) * np.float64(scale[i, j])
        tensors[name], tensors[f"{name}_scale_inv"], want[name] = codes, scale, exact
    change(tensors)
    save_file(tensors, path)
    config = dict(quant_method="fp8", fmt="e4m3", weight_block_size=BLOCK,
                  activation_scheme="dynamic")  # fmt: skip
    edit(directory, quantization_config=config)
    return tensors, want


def test_fp8_in_blocks_is_dequantized(tmp_path):
    """Sizes that are no multiples of a block's; layers after the last have scales too."""
    make("deepseek").save_pretrained(tmp_path / "fp8")
    tensors, want = quantized(
        tmp_path / "fp8",
        lambda tensors: tensors.update({
            "model.layers.2.eh_proj.weight": np.ones((4, 3), jnp.float8_e4m3fn),
            "model.layers.2.eh_proj.weight_scale_inv": np.ones((1, 1), np.float32),
        }),
    )  # fmt: skip
    count = sum(name.endswith("_scale_inv") for name in tensors)
    assert any(n % 4 and m % 3 for n, m in (t.shape for t in tensors.values() if t.ndim == 2))
    with pytest.warns(UserWarning, match=f"^{count} tensors are FP8: they are dequantised$"):
        ours = load(tmp_path / "fp8")
    save(ours, tmp_path / "out", "deepseek_v3", source=tmp_path / "fp8")
    assert "quantization_config" not in described(tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, rtol=1e-7, err_msg=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert_close(ours, theirs)


def test_fp8_is_the_formula_of_the_authors():
    """``weight_dequant`` of DeepSeek-V3's kernel.py, in torch, for blocks of 128."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(200, 300)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.1, 2, (2, 3)).astype(np.float32)
    x = torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    want = torch.empty(200, 300)
    for i in range(2):
        for j in range(3):
            part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            want[part] = x.to(torch.float32)[part] * float(scale[i, j])
    np.testing.assert_array_equal(dequantize(weight, scale, (128, 128)), want.numpy())


def test_a_block_that_is_larger_than_the_matrix_takes_no_memory():
    weight = np.array([[1, -2, 3], [4, 0.5, 6]], jnp.float8_e4m3fn)
    scale = np.full((1, 1), 0.5, np.float32)
    got = dequantize(weight, scale, (2**31, 10**400))
    np.testing.assert_array_equal(got, 0.5 * weight.astype(np.float32))


def test_nothing_is_said_of_fp8_where_there_is_none(tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    edit(tmp_path, quantization_config=dict(quant_method="fp8", weight_block_size=BLOCK))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)


FP8 = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(FP8 + "_scale_inv"), f"tensor='{FP8}': is F8_E4M3: requires {FP8}_scale"),
        (lambda t: t.pop(FP8), f"tensor='{FP8}_scale_inv': is the scale of a tensor that does not"),
        (lambda t: t.update({FP8 + 2 * "_scale_inv": np.ones((1, 1), np.float32)}),
         f"tensor='{FP8}_scale_inv_scale_inv': is the scale of a tensor that does not"),
        (lambda t: t.update({FP8: t[FP8].astype(np.float32)}),
         f"tensor {FP8}='F32': must be F8_E4M3: it has scales"),
        (lambda t: t.update({FP8 + "_scale_inv": np.ones((2, 2), np.float32)}),
         rf"tensor {FP8}_scale_inv=\[2, 2\]: must have shape \[3, 6\]"),
        (lambda t: t.update({FP8 + "_scale_inv": np.ones((3, 6), jnp.float8_e8m0fnu)}),
         f"tensor {FP8}_scale_inv='F8_E8M0': must be F32 or BF16"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*tensors are FP8")
def test_fp8_without_its_scales_is_refused_by_name(change, message, tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    quantized(tmp_path, change)
    with pytest.raises(ConfigError, match=f"^{message}") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*tensors are FP8")
def test_fp8_that_no_field_announces_is_refused(tmp_path):
    make("deepseek").save_pretrained(tmp_path)
    quantized(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale_inv")])
    edit(tmp_path, quantization_config=...)
    with pytest.raises(ConfigError, match="^tensor .*='F8_E4M3': must be F64, F32"):
        load(tmp_path)
