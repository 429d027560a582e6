"""What ours are measured against, by name. Each takes the op's arrays and gives its output."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from research.benchmark.measure import Prepared


def _naive_attention(q, k, v):
    scores = jnp.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshc->bthc", weights, v)


def _jax_nn(implementation):
    def attention(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return attention


def _heads_first(module, name, **settings):
    def attention(q, k, v):
        function = getattr(importlib.import_module(module), name)
        swapped = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        y = function(*swapped, causal=True, sm_scale=q.shape[-1] ** -0.5, **settings)
        return jnp.swapaxes(y, 1, 2)

    return attention


def _triton(q, k, v):
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    return module.mha(q, k, v, None, causal=True, sm_scale=q.shape[-1] ** -0.5)


def _tokamax(q, k, v):
    return importlib.import_module("tokamax").dot_product_attention(q, k, v, is_causal=True)


def _dense_experts(x, weights, sizes):
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    y = jnp.zeros((x.shape[0], weights.shape[2]), x.dtype)
    for e in range(weights.shape[0]):
        y += jnp.where((group == e)[:, None], x, 0) @ weights[e]
    return y


def _megablox(x, weights, sizes):
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox")
    return module.gmm(x, weights, sizes, x.dtype)


_CHIP_MATMUL = {"ragged_dot": jax.lax.ragged_dot}
_TPU_FLASH = _heads_first("jax.experimental.pallas.ops.tpu.flash_attention", "flash_attention")

# op → platform → name → function of the op's arrays; "torch_sdpa" is prepared by `torch_attention`
PEERS: Mapping[str, Mapping[str, Mapping[str, Callable | None]]] = {
    "flash_attention": {
        "cpu": {"torch_sdpa": None, "naive": _naive_attention, "jax_nn": _jax_nn("xla")},
        "gpu": {
            "cudnn": _jax_nn("cudnn"),
            "jax_triton": _triton,
            "tokamax": _tokamax,
            "torch_sdpa": None,
        },
        "tpu": {"jax_flash": _TPU_FLASH, "jax_nn": _jax_nn("xla")},
    },
    "selective_scan": {"cpu": {}, "gpu": {}, "tpu": {}},
    "grouped_matmul": {
        "cpu": {"dense": _dense_experts, **_CHIP_MATMUL},
        "gpu": _CHIP_MATMUL,
        "tpu": {"megablox": _megablox, **_CHIP_MATMUL},
    },
}


def torch_attention(arrays: Sequence[jax.Array], backward: bool) -> Prepared:
    """PyTorch's scaled_dot_product_attention on all cores, or on the GPU.

    Raises:
      ModuleNotFoundError, RuntimeError: no torch, or one that cannot use this GPU.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    dtype = getattr(torch, str(arrays[0].dtype))
    inputs = []
    for x in arrays:
        tensor = torch.tensor(jax.device_get(x.astype(jnp.float32)))
        tensor = tensor.to(device, dtype).transpose(1, 2).contiguous()
        inputs.append(tensor.requires_grad_(backward))
    dy = torch.ones_like(inputs[0])

    def run():
        y = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        if backward:
            torch.autograd.grad(y, inputs, dy)
        if device == "cuda":
            torch.cuda.synchronize()

    return Prepared(run, None, None)
