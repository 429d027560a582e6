"""The operations, their named cases per platform, and the arrays and FLOPs of a call of each."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mask import Mask
from pallas_kernels.stored import Stored

Case = Mapping[str, int | str]

# by platform; the implementation that is made for it comes first
IMPLEMENTATIONS = {
    "cpu": ("xla", "reference"),
    "gpu": ("gpu", "xla", "reference"),
    "tpu": ("tpu", "xla", "reference"),
}


class Tuning(NamedTuple):
    """The case on which block sizes are tuned, and the sizes to try."""

    case: str
    grid: Mapping[str, tuple[int, ...]]


class Op(NamedTuple):
    """``arrays(case)``: the arguments of ``call``; ``flops(case)``: of the forward pass.

    ``call(op, *arrays, **settings)``: a call of the operation; by default of these arrays.
    """

    module: str  # in `pallas_kernels`
    arrays: Callable[[Case], list[jax.Array]]
    flops: Callable[[Case], float]
    cases: Mapping[str, Mapping[str, Case]]  # by platform
    backward: float | None  # FLOPs of forward+backward over those of forward; None: only forward
    settings: Mapping[str, Any] = {}  # keyword arguments of the op that are not its defaults
    tuning: Mapping[str, Tuning] = {}  # by platform
    call: Callable = lambda op, *arrays, **settings: op(*arrays, **settings)


def _normal(case, *shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, case["dtype"]) for k, s in zip(keys, shapes, strict=True)]


def _attention(case):
    return _normal(case, *[(case["b"], case["t"], case["h"], case["c"])] * 3)


def _attention_flops(case):  # two products over half the square: causal
    return 2 * case["b"] * case["h"] * case["t"] ** 2 * case["c"]


def _selective(case):
    b, t, d, n = (case[k] for k in "btdn")
    x, delta, b_in, c_out, skip, z = _normal(
        case, (b, t, d), (b, t, d), (b, t, n), (b, t, n), (d,), (b, t, d)
    )
    # initialised as in Mamba: A = −1 … −n, and steps around softplus(−2) = 0.13
    a = -jnp.broadcast_to(jnp.arange(1, n + 1, dtype=case["dtype"]), (d, n))
    return [x, delta - 2, a, b_in, c_out, skip, z]


def _selective_flops(case):  # a·s + (δx)·B, then C·s: six FLOPs per state and token
    return 6 * case["b"] * case["t"] * case["d"] * case["n"]


def _ssd(case):
    b, t, h, p, g, n = (case[k] for k in "bthpgn")
    x, dt, b_in, c_out, skip = _normal(
        case, (b, t, h, p), (b, t, h), (b, t, g, n), (b, t, g, n), (h,)
    )
    # initialised as in Mamba-2: A from −16 to −1, and steps around softplus(−4) = 0.02
    return [x, dt - 4, -jnp.linspace(1, 16, h, dtype=case["dtype"]), b_in, c_out, skip]


def _ssd_flops(case):  # Δ·x·B, decay, sum, then ·C: of the recurrence; chunks require more
    return 6 * case["b"] * case["t"] * case["h"] * case["p"] * case["n"]


def _wkv4(case):
    b, t, d = (case[k] for k in "btd")
    return _normal(case, (d,), (d,), (b, t, d), (b, t, d))


def _wkv4_flops(case):  # twice: maximum, two exponentials, four products and sums; a division
    return 18 * case["b"] * case["t"] * case["d"]


def _wkv7(case):
    shape = tuple(case[k] for k in "bthc")
    r, w, k, v, a, rate = _normal(case, *[shape] * 6)
    # as in RWKV-7: a key of length 1, a decay of at least exp(−0.61)
    key = a / jnp.linalg.norm(a.astype(jnp.float32), axis=-1, keepdims=True).astype(a.dtype)
    return [r, -0.5 - jax.nn.softplus(w), k, v, -key, key * jax.nn.sigmoid(rate)]


def _wkv7_flops(case):  # removal, decay, replacement, addition and read, of a square per head
    return 9 * case["b"] * case["t"] * case["h"] * case["c"] ** 2


def _grouped(case):
    m, d, f, e = (case[k] for k in "mdfe")
    x, weights = _normal(case, (m, d), (e, d, f))
    # uneven group sizes, as from a router
    sizes = np.random.default_rng(0).multinomial(m, np.full(e, 1 / e))
    return [x, weights / math.sqrt(d), jnp.asarray(sizes, jnp.int32)]


def _grouped_flops(case):
    return 2 * case["m"] * case["d"] * case["f"]


def _paged(case):
    """Decoding: one query for each row, whose pages are full and in a random order.

    The queries, their positions, those of the pages, the table, the tokens of each row; then the
    arrays of keys and of values.
    """
    b, s, h, k, c, page = (case[name] for name in ("b", "s", "h", "k", "c", "page"))
    n = s // page
    pages = np.random.default_rng(0).permutation(b * n).astype(np.int32).reshape(b, n)
    keys, values = _normal(case, *[(b * n, k, page, c)] * 2)
    stored = [Stored.of(a, case["pages"]) for a in (keys, values)]
    positions = np.zeros((b * n, page), np.int32)
    positions[pages] = np.arange(s).reshape(n, page)
    return [
        *_normal(case, (b, 1, h, c)),
        jnp.full((b, 1), s - 1, jnp.int32),
        jnp.asarray(positions),
        jnp.asarray(pages),
        jnp.full((b,), s, jnp.int32),
        *jax.tree.leaves(stored),
    ]


def paged_call(op, q, at, positions, table, written, *arrays, **settings):
    """``op`` of the arrays of a case of paged attention."""
    stored = []
    for codes, *numbers in (arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]):
        scale, minimum = (*numbers, None, None)[:2]
        dtype = str(codes.dtype) if minimum is None else "int4"
        stored.append(Stored(codes, scale, minimum, dtype))
    mask = Mask(q_positions_bt=at)
    return op(q, *stored, positions, None, table, written, mask, **settings)


def _paged_flops(case):  # two products
    return 4 * case["b"] * case["h"] * case["s"] * case["c"]


def _paged_cases(sizes, h, k, c, page, dtype):
    shape = {"h": h, "k": k, "c": c, "page": page, "dtype": dtype}
    return {
        f"b{b}_s{s}{'' if pages == dtype else '_' + pages}": {
            "b": b, "s": s, **shape, "pages": pages
        }
        for b, s in sizes
        for pages in (dtype, "int8")
    }  # fmt: skip


def _attention_cases(batch_tokens, lengths, h, c, dtype):
    sizes = {"h": h, "c": c, "dtype": dtype}
    return {f"t{t}": {"b": max(1, batch_tokens // t), "t": t, **sizes} for t in lengths}


def _platforms(cpu, chip):
    return {"cpu": cpu, "gpu": chip, "tpu": chip}


def _scans(cpu, chip):
    def cases(sizes, dtype):
        return {f"t{sizes['t']}": {**sizes, "dtype": dtype}}

    return _platforms(cases(cpu, "float32"), cases(chip, "bfloat16"))


_GROUPED_CPU = {"e8": {"m": 2048, "e": 8, "d": 256, "f": 512, "dtype": "float32"}}
_GROUPED_CHIP = {
    f"e{e}": {"m": 16384, "e": e, "d": 4096, "f": 14336, "dtype": "bfloat16"} for e in (8, 64)
}

# all operations; `known` has those whose module exists
OPS: dict[str, Op] = {
    "flash_attention": Op(
        "flash_attention",
        _attention,
        _attention_flops,
        _platforms(
            _attention_cases(0, (1024, 4096, 16384), 8, 64, "float32"),
            _attention_cases(16384, (4096, 8192, 16384, 32768), 16, 128, "bfloat16"),
        ),
        3.5,
        tuning={
            "cpu": Tuning("t4096", {"query": (256, 512, 1024), "key": (256, 512, 1024)}),
            "gpu": Tuning("t16384", {"query": (64, 128), "key": (64, 128), "kernels": (1, 2)}),
            "tpu": Tuning("t16384", {"query": (256, 512, 1024), "key": (512, 1024, 2048)}),
        },
    ),
    "paged_attention": Op(
        "paged_attention",
        _paged,
        _paged_flops,
        _platforms(
            _paged_cases([(8, 2048)], 8, 2, 64, 16, "float32"),
            _paged_cases([(8, 2048), (32, 8192)], 32, 8, 128, 32, "bfloat16"),
        ),
        None,
        tuning={
            "cpu": Tuning("b8_s2048", {"key": (128, 256, 512)}),
            "gpu": Tuning("b32_s8192", {"key": (32, 64, 128), "splits": (4, 8, 16)}),
            "tpu": Tuning("b32_s8192", {"key": (256, 512, 1024)}),
        },
        call=paged_call,
    ),
    "grouped_matmul": Op(
        "grouped_matmul",
        _grouped,
        _grouped_flops,
        _platforms(_GROUPED_CPU, _GROUPED_CHIP),
        3.0,
        tuning={
            "gpu": Tuning("e8", {"rows": (64, 128), "inner": (32, 64), "columns": (128, 256)}),
        },
    ),
    "selective_scan": Op(
        "selective_scan",
        _selective,
        _selective_flops,
        _scans({"b": 2, "t": 2048, "d": 512, "n": 16}, {"b": 8, "t": 4096, "d": 4096, "n": 16}),
        3.0,
        settings={"delta_softplus": True},
    ),
    "ssd": Op(
        "ssd",
        _ssd,
        _ssd_flops,
        _scans(
            {"b": 2, "t": 2048, "h": 8, "p": 64, "g": 1, "n": 128},
            {"b": 8, "t": 4096, "h": 64, "p": 64, "g": 1, "n": 128},
        ),
        3.0,
        settings={"dt_softplus": True},
        tuning={"cpu": Tuning("t2048", {"chunk": (32, 64, 128, 256)})},
    ),
    "wkv4": Op(
        "wkv",
        _wkv4,
        _wkv4_flops,
        _scans({"b": 2, "t": 1024, "d": 512}, {"b": 8, "t": 4096, "d": 4096}),
        3.0,
        tuning={"cpu": Tuning("t1024", {"chunk": (16, 32, 64, 128)})},
    ),
    "wkv7": Op(
        "wkv",
        _wkv7,
        _wkv7_flops,
        _scans({"b": 1, "t": 1024, "h": 8, "c": 64}, {"b": 8, "t": 4096, "h": 32, "c": 64}),
        3.0,
        tuning={"cpu": Tuning("t1024", {"chunk": (16, 32, 64, 128)})},
    ),
}


def known() -> dict[str, Op]:
    """The operations whose module exists in `pallas_kernels`."""
    return {
        name: op
        for name, op in OPS.items()
        if importlib.util.find_spec(f"pallas_kernels.{op.module}") is not None
    }


def ours(name: str, implementation: str, blocks: Mapping[str, int] | None = None) -> Callable:
    """The operation ``name``, returning only its first output."""
    settings = dict(OPS[name].settings) | ({} if blocks is None else {"blocks": blocks})

    def call(*arrays):
        op = getattr(importlib.import_module(f"pallas_kernels.{OPS[name].module}"), name)
        y = OPS[name].call(op, *arrays, implementation=implementation, **settings)
        return y[0] if isinstance(y, tuple) else y

    return call
