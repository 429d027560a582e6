"""Flash attention compiled for TPUs and GPUs, the kernel for Hopper, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.flash_attention import flash_attention, gpu_hopper
from tests.pallas_kernels.conftest import (
    TPUS,
    compile_for_gpu,
    compile_for_tpu,
    interpreted,
    lower_for_gpu,
    mosaic_gpu_interpreted,
    mosaic_gpu_races,
    topology_mesh,
    triton_kernels,
)
from tests.pallas_kernels.test_flash_attention import (
    CASES,
    arrays,
    assert_close,
    attend,
    exact,
    images,
    packed,
    value_and_gradients,
)


def gradients(q, k, v, **options):
    """Of all three operands; the kernel is chosen by the platform it is lowered for."""

    def total(q, k, v):
        y, lse = attend(q, k, v, return_lse=True, **options)
        return y.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def shapes(dtype, c, t=2000, h=8, k=2):
    return [jax.ShapeDtypeStruct((2, t, heads, c), dtype) for heads in (h, k, k)]


FEATURES = {
    "bfloat16 128": (jnp.bfloat16, 128, {}),
    "float32 64": (jnp.float32, 64, {}),
    "bfloat16 96": (jnp.bfloat16, 96, dict(window=700, soft_cap=30.0)),
    "bfloat16 256": (jnp.bfloat16, 256, dict(causal=False)),
    "bfloat16 80": (
        jnp.bfloat16, 80,
        dict(packed(2, 2000), alibi_slopes_h=np.ones(8, np.float32),
             sinks_h=np.ones(8, np.float32), until_bt=images(2000)),
    ),
}  # fmt: skip


# 128 queries, keys of which the first 128 are padding, four blocks are seen by all and 60 are left
IN_TWO = (1, 128, 700, 2, 1, 64, dict(
    causal=False, soft_cap=3.0, sinks_h=np.array([1.0, -2.0], np.float32),
    k_positions_bs=np.maximum(np.arange(700) - 128, -1)[None],
))  # fmt: skip


def run_in_two(dtype=jnp.bfloat16):
    """``(y, lse)`` of the two kernels, and of the equation in float32 from the same numbers."""
    b, t, s, h, k, c, options = IN_TWO
    rng = np.random.default_rng(0)
    shapes = ((b, t, h, c), (b, s, k, c), (b, s, k, c))
    qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    run = functools.partial(attend, **options, return_lse=True)
    got = run(*qkv, implementation="gpu", blocks=dict(kernels=2))
    return got, run(*(a.astype(jnp.float32) for a in qkv), implementation="reference")


def check_the_hopper_kernel():
    real, ran = gpu_hopper.clear_blocks, []

    def clear_blocks(*arguments):
        ran.append(True)
        with mosaic_gpu_interpreted():
            return real(*arguments)

    gpu_hopper.clear_blocks = clear_blocks
    with interpreted("gpu"):
        got, want = jax.block_until_ready(run_in_two())
    assert ran and mosaic_gpu_races() is False
    np.testing.assert_allclose(np.float32(got[0]), want[0], atol=1e-2)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_the_hopper_kernel_goes_before_and_does_not_race(run_script):
    """In a process of its own: a wait in vain, there as on a chip, has no end."""
    run_script(
        "from tests.pallas_kernels.test_flash_attention_devices import check_the_hopper_kernel\n"
        "check_the_hopper_kernel()",
        devices=1,
        timeout=120,
    )


def test_the_hopper_kernel_lowers_for_a_gpu():
    """Asked for by its number, where it can serve: Triton does without it what it cannot."""
    run = functools.partial(flash_attention, implementation="gpu", blocks=dict(kernels=2))
    text = lower_for_gpu(run, *shapes(jnp.bfloat16, 128, t=512))
    assert "@mosaic_gpu" in text and triton_kernels(text) == KERNELS[:1]
    for dtype, c, t in ((jnp.float32, 128, 512), (jnp.bfloat16, 80, 512), (jnp.bfloat16, 128, 64)):
        text = lower_for_gpu(run, *shapes(dtype, c, t=t))
        assert "@mosaic_gpu" not in text and triton_kernels(text) == KERNELS[:1]


KERNELS = ["flash_attention", "flash_attention_dq", "flash_attention_dkv"]


@pytest.mark.parametrize("case", ["float32 64", "bfloat16 80"])
def test_lowers_for_a_gpu(case):
    """Chosen by the platform it is lowered for, forward and backward.

    Keys come with heads of their own: they are not repeated for those that share them.
    """
    dtype, c, options = FEATURES[case]
    text = lower_for_gpu(functools.partial(gradients, **options), *shapes(dtype, c))
    assert triton_kernels(text) == KERNELS
    keys = "x2x64xf32>" if c == 64 else "x2x128xbf16>"
    assert all(keys in line for line in text.splitlines() if "gpu.triton" in line)


def test_what_no_kernel_can_serve_takes_another_way_on_a_gpu():
    text = lower_for_gpu(flash_attention, *shapes(jnp.float32, 512))
    assert not triton_kernels(text) and "stablehlo.while" in text


@pytest.mark.gpu_compile
@pytest.mark.parametrize("case", FEATURES)
def test_compiles_for_a_gpu(case):
    dtype, c, options = FEATURES[case]
    text = compile_for_gpu(functools.partial(gradients, **options), *shapes(dtype, c)).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3


@pytest.mark.gpu_compile
def test_a_block_that_does_not_fit_a_gpu_fails():
    run = functools.partial(gradients, blocks=dict(query=512, key=512))
    with pytest.raises(Exception, match="(?i)shared memory"):
        compile_for_gpu(run, *shapes(jnp.bfloat16, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, gpu):
    got = value_and_gradients(*arrays(case), "gpu")
    assert_close(got, exact(case), 2e-5)
    assert not np.any(got[0][0]) or "nothing" not in case


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_hopper_kernel_on_a_gpu(dtype, gpu):
    if gpu.compute_capability != "9.0":
        pytest.skip("not an H100 or H200")
    got, want = run_in_two(dtype)
    np.testing.assert_allclose(np.float32(got[0]), want[0], atol=1e-2)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    for name, (_, c, options) in FEATURES.items():
        rng = np.random.default_rng(0)
        qkv = [jnp.asarray(rng.normal(size=(2, 2000, n, c)), dtype) for n in (8, 2, 2)]
        run = functools.partial(attend, **options, implementation="gpu")
        one, two = (np.float32(run(*qkv, blocks=dict(kernels=n))) for n in (1, 2))
        np.testing.assert_allclose(two, one, atol=2e-2, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FEATURES)
def test_features_on_a_gpu(case, gpu):
    dtype, c, options = FEATURES[case]
    rng = np.random.default_rng(0)
    b, t, h = 2, 2000, 8
    operands = [rng.normal(size=(b, t, heads, c)) for heads in (h, 2, 2, h)]
    operands = [np.asarray(jnp.asarray(a, dtype).astype(jnp.float32)) for a in operands]
    want = value_and_gradients(operands, options, "reference")
    got = value_and_gradients([jnp.asarray(a, dtype) for a in operands], options, "gpu")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error = np.abs(a.astype(np.float64) - b).max() / np.abs(b).max()
        assert error < (2e-5 if dtype == jnp.float32 else 2e-2), error


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("generation", "case"),
    [*(("v5e", case) for case in FEATURES), *((tpu, "bfloat16 80") for tpu in list(TPUS)[1:])],
)
def test_compiles_for_tpus(generation, case):
    dtype, c, options = FEATURES[case]
    run = functools.partial(gradients, **options)
    compiled = compile_for_tpu(run, topology_mesh(generation, (1,), ("data",)), *shapes(dtype, c))
    text = compiled.as_text()
    for kernel in ("flash_attention", "flash_attention_dq", "flash_attention_dkv"):
        assert f"{kernel}" in text
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.tpu_compile
def test_compiles_inside_a_sharded_program():
    mesh = topology_mesh("v5p", (2, 2), ("data", "tensor"))
    spec = PartitionSpec("data", None, "tensor", None)
    run = jax.shard_map(
        gradients, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3, check_vma=False
    )
    compiled = compile_for_tpu(run, mesh, *shapes(jnp.bfloat16, 128), specs=[spec] * 3)
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.tpu_compile
def test_a_block_that_does_not_fit_fails():
    run = functools.partial(flash_attention, blocks=dict(query=1024, key=4096))
    mesh = topology_mesh("v5e", (1,), ("data",))
    with pytest.raises(Exception, match="(?i)vmem|resource_exhausted"):
        compile_for_tpu(run, mesh, *shapes(jnp.bfloat16, 128, t=4096))
