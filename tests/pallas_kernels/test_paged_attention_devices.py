"""Paged attention and its update compiled for TPUs and GPUs, and on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mask import Mask
from pallas_kernels.paged_attention import paged_attention, update_pages
from pallas_kernels.stored import DTYPES, Stored
from tests.pallas_kernels.conftest import (
    GENERATIONS,
    compile_for_gpu,
    compile_for_tpu,
    lower_for_gpu,
    topology_mesh,
    triton_kernels,
)
from tests.pallas_kernels.test_paged_attention import (
    CASES,
    SINKS,
    SLOPES,
    SMALL,
    equation,
    inputs,
    run,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The shapes of a call to compile; without segments and ``until`` if not ``packed``."""

    dtype: str = "bfloat16"
    q_dtype: str = "bfloat16"
    b: int = 8
    t: int = 1
    heads: tuple[int, int] = (32, 8)
    channels: int = 128
    page: int = 32
    packed: bool = False
    latent: int | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def arguments(self, pages=64, n=40):
        ints, (h, k) = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32), self.heads
        shape = (pages, k, self.page, self.channels)
        stored = jax.eval_shape(lambda: Stored.empty(shape, self.dtype))
        of_pool = ints((pages, self.page))
        new = ints((self.b, self.t))
        return (
            jax.ShapeDtypeStruct((self.b, self.t, h, self.channels), self.q_dtype),
            (
                stored,
                stored if self.latent is None else None,
                of_pool,
                of_pool if self.packed else None,
                ints((self.b, n)),
                ints((self.b,)),
            ),
            (new, *(new if self.packed else None for _ in range(2))),
        )

    def attend(self, q, pages, of_queries, implementation=None):
        at, inside, until = of_queries
        options = dict(self.options, value_channels=self.latent, implementation=implementation)
        mask = Mask(
            q_positions_bt=at,
            q_segments_bt=inside,
            until_bt=until,
            window=options.pop("window", None),
        )
        return paged_attention(q, *pages, mask, **options)

    def update(self, q, pages, of_queries):
        """New tokens, which are among the queries."""
        keys, values, positions, segments, table, written = pages
        at, inside, _ = of_queries
        new = q[:, :, : keys.codes.shape[1]]
        v = None if values is None else new
        return update_pages(keys, values, positions, segments, new, v, at, inside, table, written)


CALLS = {
    "decode": Call(page=16),
    "chunk": Call(b=1, t=256),
    "int8": Call("int8"),
    "int4": Call("int4", heads=(4, 2), channels=64, t=5),
    "e4m3": Call("float8_e4m3fn"),
    "float32, everything": Call(
        "float32", "float32", 2, 5, (4, 4), 64, 8, packed=True,
        options=dict(window=50, soft_cap=3.0, scale=0.5, alibi_slopes_h=SLOPES, sinks_h=SINKS),
    ),
    "int8 for float32": Call("int8", "float32", 2, 5, (4, 2), 80, packed=True),
    "latent": Call(heads=(128, 1), channels=576, latent=512),
}  # fmt: skip


@pytest.mark.parametrize("case", ["int4", "e4m3", "latent"])
def test_lowers_for_a_gpu(case):
    """Chosen by the platform; what no kernel supports takes another way."""
    text = lower_for_gpu(CALLS[case].attend, *CALLS[case].arguments())
    kernels = triton_kernels(text)
    assert kernels == ([] if case == "latent" else ["paged_attention"])
    assert kernels or "stablehlo.while" in text


def check_compiles(call: Call, generation: str):
    """Both operations, chosen by the platform."""
    mesh = topology_mesh(generation, (1,), ("data",))
    text = compile_for_tpu(call.attend, mesh, *call.arguments()).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1 and "paged_attention" in text
    text = compile_for_tpu(call.update, mesh, *call.arguments()).as_text()
    count = 1 if call.latent else 2
    assert text.count('custom_call_target="tpu_custom_call"') == count and "update_pages" in text


QUICK = ("decode", "int4", "float32, everything")


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CALLS]
)
def test_compiles_for_tpus(case):
    check_compiles(CALLS[case], "v5e")


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", GENERATIONS[1:])
def test_compiles_for_other_tpus(generation):
    check_compiles(CALLS["chunk"], generation)


@pytest.mark.gpu_compile
@pytest.mark.parametrize("case", [case for case in CALLS if case != "latent"])
def test_compiles_for_a_gpu(case):
    text = compile_for_gpu(CALLS[case].attend, *CALLS[case].arguments()).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, dtype, gpu):
    given = inputs(CASES[case], dtype)
    for blocks in (None, SMALL["gpu"]):
        np.testing.assert_allclose(run(given, "gpu", blocks=blocks), equation(given), atol=2e-5)
