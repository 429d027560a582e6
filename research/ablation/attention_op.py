"""Memory, time and error of the attention operation by itself, without a model.

Every measurement covers the forward and the backward pass together: causal self-attention of
``[batch, length, heads, head_dim]`` and its gradients by queries, keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layers.config import check, check_types
from layers.context_parallel import sharded_attention
from pallas_kernels.mask import Mask
from research.ablation.measure import median_times, temporary_bytes
from research.parallel import use_mesh
from research.planning.topology import compile_for_tpu, topology_mesh


@dataclasses.dataclass(frozen=True)
class AttentionOp:
    """The attention operation that is measured.

    Attributes:
      implementation: of `pallas_kernels.flash_attention`; None selects the platform's default.
    """

    heads: int
    head_dim: int
    dtype: str
    implementation: str | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("heads", "head_dim"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")

    def operands(self, length: int, seed: int) -> list[jax.Array]:
        """``q, k, v, dy`` with standard normal values."""
        rng = np.random.default_rng((seed, length))
        shape = (4, 1, length, self.heads, self.head_dim)
        return list(jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype))

    def both_passes(self) -> Callable:
        """The jitted function ``(q, k, v, dy) -> (y, (dq, dk, dv))``."""

        def run(q, k, v):
            return sharded_attention(q, k, v, Mask(), implementation=self.implementation)

        def passes(q, k, v, dy):
            y, pull = jax.vjp(run, q, k, v)
            return y, pull(dy)

        return jax.jit(passes)

    def errors(self, length: int, seed: int) -> dict[str, float]:
        """``error`` of the result and ``gradient_error`` of the worst gradient against float64.

        Each is the largest absolute difference, divided by the largest absolute value.
        """
        operands = self.operands(length, seed)
        computed = self.both_passes()(*operands)
        with jax.enable_x64(True):
            exact_op = dataclasses.replace(self, dtype="float64", implementation="reference")
            wide = [jnp.asarray(np.asarray(a, np.float64)) for a in operands]
            exact_results = exact_op.both_passes()(*wide)

        def error(actual, expected):
            actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
            return float(np.abs(actual - expected).max() / np.abs(expected).max())

        gradients = map(error, computed[1], exact_results[1])
        return dict(error=error(computed[0], exact_results[0]), gradient_error=max(gradients))

    def memory(self, lengths: Sequence[int]) -> list[int]:
        """Bytes of temporaries at each of ``lengths``, compiled for this machine and not run."""
        sizes = []
        for length in lengths:
            shape = (1, length, self.heads, self.head_dim)
            operand = jax.ShapeDtypeStruct(shape, self.dtype)
            sizes.append(temporary_bytes(self.both_passes().lower(*[operand] * 4).compile()))
        return sizes

    def tpu_memory(self, lengths: Sequence[int], topology: str) -> list[int]:
        """As `memory`, compiled for the slice ``topology`` with one row of the batch per chip.

        Only bytes in HBM are counted. The compiler keeps in VMEM what fits there.
        """
        mesh = topology_mesh(topology)
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        sizes = []
        with use_mesh(mesh):
            for length in lengths:
                shape = (mesh.size, length, self.heads, self.head_dim)
                operand = jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
                compiled = compile_for_tpu(self.both_passes(), *[operand] * 4)
                sizes.append(temporary_bytes(compiled))
        return sizes

    def speedup(self, baseline: "AttentionOp", length: int, *, rounds: int, seed: int) -> float:
        """How many times faster this operation is than ``baseline``.

        The ratio of the median times of calls that alternate.
        """
        operands = self.operands(length, seed)
        runs = [functools.partial(op.both_passes(), *operands) for op in (baseline, self)]
        slow, fast = median_times(runs, rounds)
        return slow / fast
