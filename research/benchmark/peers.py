"""The peers that our operations are compared with, by name.

Each takes the arrays of an operation and returns its output.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.pages import gathered
from pallas_kernels.stored import Stored
from research.benchmark.measure import Prepared, both_passes, prepare, sample
from research.benchmark.ops import paged_call


class Peer(NamedTuple):
    """``prepare(arrays, backward)``: prepare a call; with ``backward`` the last array is ``dy``.

    ``package`` is the name for pip, ``module`` the name in Python.
    """

    prepare: Callable[[Sequence[jax.Array], bool], Prepared]
    package: str = "jax"
    module: str = "jax"


def of_jax(function: Callable, package: str = "jax", module: str = "jax") -> Peer:
    """A peer that is a function of the operation's JAX arrays."""

    def prepare_passes(arrays, backward):
        return prepare(both_passes(function, arrays[:-1]) if backward else function, arrays)

    return Peer(prepare_passes, package, module)


def arranged(arrange: Callable, function: Callable) -> Peer:
    """A peer that is ``function(*arrange(*arrays))``; only ``function`` is timed, forward."""

    def prepare_forward(arrays, backward):
        assert not backward, "the operation has no backward pass"
        return prepare(function, jax.jit(arrange)(*arrays))

    return Peer(prepare_forward)


def missing(peer: Peer) -> str | None:
    """Why ``peer`` cannot be measured in this environment; None if it can."""
    if importlib.util.find_spec(peer.module) is None:
        return f"skipped: {peer.package} is not installed"
    return None


def _call(module: str, name: str, *arguments, **settings):
    return getattr(importlib.import_module(module), name)(*arguments, **settings)


_GPU = "jax.experimental.pallas.ops.gpu."
_TPU = "jax.experimental.pallas.ops.tpu."


def _naive_attention(q, k, v):
    scores = jnp.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshc->bthc", weights, v)


def _jax_nn(implementation):
    def attention(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return attention


def _mgpu(q, k, v):
    module = importlib.import_module(_GPU + "attention_mgpu")
    # the largest block of keys in its own benchmark that fits beside two blocks of 64 queries
    keys = 256 if q.shape[-1] <= 64 else 128
    config = module.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=True)
    # the caller applies the scale
    return module.attention(q * q.shape[-1] ** -0.5, k, v, config)


def _jla_attention(q, k, v):
    return _call("jla.ops.mosaic_gpu.attention", "flash_attention", q, k, v)


def _tpu_flash(q, k, v):
    module = importlib.import_module(_TPU + "flash_attention")
    # its default blocks of 128 work for any size; ours are tuned, so it gets blocks for this length
    names = module.BlockSizes.__dataclass_fields__
    sizes = {n: 1 if n == "block_b" else min(512, q.shape[1]) for n in names}
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scale, blocks = q.shape[-1] ** -0.5, module.BlockSizes(**sizes)
    y = module.flash_attention(q, k, v, causal=True, sm_scale=scale, block_sizes=blocks)
    return jnp.swapaxes(y, 1, 2)


def _tpu_splash(q, k, v):
    module = importlib.import_module(_TPU + "splash_attention")
    t, heads = q.shape[1:3]
    passes = {"", "_dkv"}
    sizes = {f"block_q{p}": min(512, t) for p in passes} | {
        f"block_kv{p}{c}": min(1024, t) for p in passes for c in ("", "_compute")
    }
    kernel = module.make_splash_mha_single_device(
        module.MultiHeadMask([module.CausalMask((t, t))] * heads),
        block_sizes=module.BlockSizes(use_fused_bwd_kernel=True, **sizes),
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)


def _tokamax(q, k, v):
    # "mosaic": its own choice of kernel, but not the silent fallback to XLA
    return _call("tokamax", "dot_product_attention", q, k, v, is_causal=True,
                 implementation="mosaic")  # fmt: skip


def _tokamax_ragged(x, weights, sizes):
    return _call("tokamax", "ragged_dot", x, weights, sizes, implementation="mosaic")


def _dense_experts(x, weights, sizes):
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    y = jnp.zeros((x.shape[0], weights.shape[2]), x.dtype)
    for e in range(weights.shape[0]):
        y += jnp.where((group == e)[:, None], x, 0) @ weights[e]
    return y


def _megablox(x, weights, sizes):
    # its default tile of 128 works for any size
    m, (_, d, f) = len(x), weights.shape
    tile = (min(m, 512), min(d, 1024), min(f, 1024))
    return _call(_TPU + "megablox", "gmm", x, weights, sizes, x.dtype, tile)


def _mgpu_ragged(x, weights, sizes):
    return _call(
        _GPU + "ragged_dot_mgpu", "ragged_dot", x, weights, group_sizes=sizes, block_m=128,
        block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8,
    )  # fmt: skip


def _jla_ragged(x, weights, sizes):
    return _call("jla.ops.mosaic_gpu.ragged_dot", "ragged_dot", x, weights, sizes)


def _associative_scan(x, delta, a, b, c, d, z):
    in_float32 = [array.astype(jnp.float32) for array in (x, delta, a, b, c, d, z)]
    x32, delta, a, b, c, d, z = in_float32
    delta = jax.nn.softplus(delta)
    decay = jnp.exp(jnp.einsum("btd,dn->btdn", delta, a))
    inputs = jnp.einsum("btd,btn->btdn", delta * x32, b)

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    _, state = jax.lax.associative_scan(combine, (decay, inputs), axis=1)
    y = jnp.einsum("btdn,btn->btd", state, c) + d * x32
    return (y * jax.nn.silu(z)).astype(x.dtype)


def _quadratic_ssd(x, dt, a, b, c, d):
    # the quadratic dual form, as masked attention (Dao & Gu 2024, §4.1)
    x, dt, a, b, c, d = (array.astype(jnp.float32) for array in (x, dt, a, b, c, d))
    dt = jax.nn.softplus(dt)
    log_decay = jnp.cumsum(dt * a, 1)
    difference = log_decay[:, :, None] - log_decay[:, None]
    causal = jnp.tri(x.shape[1], dtype=bool)[..., None]
    decay = jnp.exp(jnp.where(causal, difference, -jnp.inf))
    scores = jnp.repeat(jnp.einsum("btgn,bugn->btug", c, b), x.shape[2] // b.shape[2], -1)
    return jnp.einsum("btuh,buhp->bthp", scores * decay, dt[..., None] * x) + d[:, None] * x


def _jla_ssd(x, dt, a, b, c, d):
    in_float32, dtype = (x.astype(jnp.float32), d.astype(jnp.float32)), x.dtype
    dt = jax.nn.softplus(dt.astype(jnp.float32))
    v = (dt[..., None] * in_float32[0]).astype(dtype)
    settings = {"g": dt * a.astype(jnp.float32), "scale": 1.0, "impl": "mosaic_gpu"}
    y = _call("jla.ops", "linear_attention", "simple_gla", c, b, v, **settings)[0]
    return (y.astype(jnp.float32) + in_float32[1][:, None] * in_float32[0]).astype(dtype)


def _jla_mamba(x, delta, a, b, c, d, z):
    settings = {"dt": delta, "a": a, "d": d, "z": z, "dt_softplus": True, "impl": "mosaic_gpu"}
    return _call("jla.ops", "linear_attention", "mamba1", c, b, x, **settings)[0]


def _jla_rwkv7(r, w, k, v, a, b):
    settings = {"w": -jnp.exp(w.astype(jnp.float32)), "a": a, "b": b, "impl": "mosaic_gpu"}
    # RWKV-7's decays are at least exp(−0.61); its faster mode requires such a bound
    return _call("jla.ops", "linear_attention", "rwkv7", r, k, v, lower_bound=-0.61, **settings)[0]


def _pages(q, at, positions, table, written, *arrays):
    """The `Stored` keys and values of a case of paged attention."""
    return paged_call(lambda *a, **_: a[1:3], q, at, positions, table, written, *arrays)


def _contiguous(q, at, positions, table, written, *arrays):
    k, v = (
        gathered(a, table).load(q.dtype) for a in _pages(q, at, positions, table, written, *arrays)
    )
    k_at = jnp.broadcast_to(jnp.arange(k.shape[2]), (q.shape[0], k.shape[2]))
    return q, k, v, at, k_at


def _contiguous_attention(q, k, v, at, k_at):
    # heads before slots, as our caches have them
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    return flash_attention(q, k, v, Mask(q_positions_bt=at, k_positions_bs=k_at))


def _without_codes(q, *arrays):
    keys, values = _pages(q, *arrays)
    if keys.scale is None:
        raise ValueError("the pages have no codes")
    return q, *arrays[:4], *(Stored.of(a.load(), str(q.dtype)).codes for a in (keys, values))


def _paged_attention(*arrays):
    return paged_call(paged_attention, *arrays)


def _jax_paged_pages(q, at, positions, table, written, *arrays):
    keys, values = _pages(q, at, positions, table, written, *arrays)
    pools = [jnp.swapaxes(a, 0, 1) for a in (keys.codes, values.codes)]
    scales = [None if a.scale is None else jnp.swapaxes(a.scale, 0, 1) for a in (keys, values)]
    return q[:, 0] * q.shape[-1] ** -0.5, *pools, table, written, *scales  # it applies no scale


def _jax_paged(*arrays):
    return _call(_GPU + "paged_attention", "paged_attention", *arrays)[:, None]


def _jax_ragged_pages(q, at, positions, table, written, *arrays):
    keys, values = _pages(q, at, positions, table, written, *arrays)
    if keys.scale is not None:
        raise ValueError("it does not support a scale for each vector")
    pairs = jnp.stack([jnp.swapaxes(a.codes, 1, 2) for a in (keys, values)], axis=3)
    b = jnp.asarray([q.shape[0]], jnp.int32)
    starts = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    pages = pairs.reshape(*pairs.shape[:2], -1, pairs.shape[-1])
    return q[:, 0], pages, written, table, starts, b


def _jax_ragged(q, *arrays):
    settings = {"sm_scale": q.shape[-1] ** -0.5}
    return _call(_TPU + "ragged_paged_attention", "ragged_paged_attention", q, *arrays, **settings)[
        :, None
    ]


def torch_attention(arrays: Sequence[jax.Array], backward: bool) -> Prepared:
    """PyTorch's scaled_dot_product_attention: on all cores, or its flash kernel on the GPU.

    Raises:
      ModuleNotFoundError, RuntimeError: torch is not installed, or does not support this GPU.
    """
    torch = importlib.import_module("torch")
    on_cpu = jax.default_backend() == "cpu"
    device = "cpu" if on_cpu else "cuda"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, str(arrays[0].dtype))
    tensors = []
    for x in arrays:
        tensor = torch.tensor(np.asarray(x.astype(jnp.float32))).to(device, dtype)
        tensors.append(tensor.transpose(1, 2).contiguous())
    inputs = [tensor.requires_grad_(backward) for tensor in tensors[:3]]

    def kernels():
        if on_cpu:
            return contextlib.nullcontext()
        attention = importlib.import_module("torch.nn.attention")
        return attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION)

    def run():
        with kernels():
            y = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        results = [y]
        if backward:
            results += torch.autograd.grad(y, inputs, tensors[3])
        if not on_cpu:
            torch.cuda.synchronize()
        return results

    def values(results):
        outputs = (r.detach().transpose(1, 2).contiguous() for r in results)
        return [sample(r).float().cpu().numpy() for r in outputs]

    return Prepared(run, values)


_TORCH = Peer(torch_attention, "torch", "torch")
_ASSOCIATIVE = {"associative_scan": of_jax(_associative_scan)}
_RAGGED = {"ragged_dot": of_jax(jax.lax.ragged_dot)}


def _of_tokamax(function):
    return {"tokamax": of_jax(function, "tokamax", "tokamax")}


def _of_jla(function):
    return {"jax_linear_attention": of_jax(function, "jax-linear-attention", "jla")}


_PAGED = {
    "contiguous": arranged(_contiguous, _contiguous_attention),
    "without codes": arranged(_without_codes, _paged_attention),
}

# op → platform → name → peer
PEERS: Mapping[str, Mapping[str, Mapping[str, Peer]]] = {
    "flash_attention": {
        "cpu": {
            "torch_sdpa": _TORCH,
            "naive": of_jax(_naive_attention),
            "jax_nn": of_jax(_jax_nn("xla")),
        },
        "gpu": {
            "cudnn": of_jax(_jax_nn("cudnn")),
            "attention_mgpu": of_jax(_mgpu),
            **_of_tokamax(_tokamax),
            **_of_jla(_jla_attention),
            "torch_sdpa_flash": _TORCH,
        },
        "tpu": {
            "jax_splash": of_jax(_tpu_splash),
            "jax_flash": of_jax(_tpu_flash),
            **_of_tokamax(_tokamax),
            "jax_nn": of_jax(_jax_nn("xla")),
        },
    },
    "grouped_matmul": {
        "cpu": {"dense": of_jax(_dense_experts), **_RAGGED},
        "gpu": {
            **_RAGGED,
            "ragged_dot_mgpu": of_jax(_mgpu_ragged),
            **_of_tokamax(_tokamax_ragged),
            **_of_jla(_jla_ragged),
        },
        "tpu": {"megablox": of_jax(_megablox), **_RAGGED, **_of_tokamax(_tokamax_ragged)},
    },
    "paged_attention": {
        "cpu": _PAGED,
        "gpu": {"jax_paged": arranged(_jax_paged_pages, _jax_paged), **_PAGED},
        "tpu": {"jax_ragged": arranged(_jax_ragged_pages, _jax_ragged), **_PAGED},
    },
    "selective_scan": {
        "cpu": _ASSOCIATIVE,
        "gpu": {**_of_jla(_jla_mamba), **_ASSOCIATIVE},
        "tpu": _ASSOCIATIVE,
    },
    # on GPUs and TPUs the quadratic form would require 34 GB
    "ssd": {"cpu": {"quadratic": of_jax(_quadratic_ssd)}, "gpu": _of_jla(_jla_ssd), "tpu": {}},
    "wkv4": {"cpu": {}, "gpu": {}, "tpu": {}},
    "wkv7": {"cpu": {}, "gpu": _of_jla(_jla_rwkv7), "tpu": {}},
}
