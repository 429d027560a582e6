"""What the attention operation costs and how exact it is, apart from any model.

Everything is of forward and backward pass together: the gradient by queries, keys and values of
causal self-attention of ``[batch, length, heads, head_dim]``.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layers.config import check
from layers.context_parallel import sharded_attention
from pallas_kernels.mask import Mask
from research.ablation.measure import median_times, temporary_bytes
from research.parallel import use_mesh
from research.planning.topology import compile_for_tpu, topology_mesh


@dataclasses.dataclass(frozen=True)
class AttentionOp:
    """The operation measured.

    Attributes:
      implementation: of `pallas_kernels.flash_attention`; None is the platform's own.
    """

    heads: int
    head_dim: int
    dtype: str
    implementation: str | None = None

    def __post_init__(self):
        for name in ("heads", "head_dim"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")

    def operands(self, length: int, seed: int) -> list[jax.Array]:
        """Standard normal ``q, k, v, dy``."""
        rng = np.random.default_rng((seed, length))
        shape = (4, 1, length, self.heads, self.head_dim)
        return list(jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype))

    def both_passes(self) -> Callable:
        """``(q, k, v, dy) -> (y, (dq, dk, dv))``."""

        def run(q, k, v):
            return sharded_attention(q, k, v, Mask(), implementation=self.implementation)

        def passes(q, k, v, dy):
            y, pull = jax.vjp(run, q, k, v)
            return y, pull(dy)

        return jax.jit(passes)

    def errors(self, length: int, seed: int) -> dict[str, float]:
        """``error`` of the result and ``gradient_error`` of the worst gradient against float64.

        Each is the greatest difference over the greatest value.
        """
        operands = self.operands(length, seed)
        found = self.both_passes()(*operands)
        with jax.enable_x64(True):
            exact = dataclasses.replace(self, dtype="float64", implementation="reference")
            wide = [jnp.asarray(np.asarray(a, np.float64)) for a in operands]
            wanted = exact.both_passes()(*wide)

        def error(got, want):
            got, want = np.asarray(got, np.float64), np.asarray(want)
            return float(np.abs(got - want).max() / np.abs(want).max())

        gradients = map(error, found[1], wanted[1])
        return dict(error=error(found[0], wanted[0]), gradient_error=max(gradients))

    def memory(self, lengths: Sequence[int]) -> list[int]:
        """Bytes of temporaries at each of ``lengths``, as compiled here; nothing is run."""
        found = []
        for length in lengths:
            shape = (1, length, self.heads, self.head_dim)
            operand = jax.ShapeDtypeStruct(shape, self.dtype)
            found.append(temporary_bytes(self.both_passes().lower(*[operand] * 4).compile()))
        return found

    def tpu_memory(self, lengths: Sequence[int], topology: str) -> list[int]:
        """The same as compiled for a chip of the slice ``topology``, one row of a batch each.

        Bytes of HBM: the compiler puts what fits there into VMEM, which is not counted.
        """
        mesh = topology_mesh(topology)
        place = NamedSharding(mesh, PartitionSpec("data"))
        found = []
        with use_mesh(mesh):
            for length in lengths:
                shape = (mesh.size, length, self.heads, self.head_dim)
                operand = jax.ShapeDtypeStruct(shape, self.dtype, sharding=place)
                compiled = compile_for_tpu(self.both_passes(), *[operand] * 4)
                found.append(temporary_bytes(compiled))
        return found

    def speedup(self, baseline: "AttentionOp", length: int, *, rounds: int, seed: int) -> float:
        """How many times faster it is than ``baseline``: medians of times taken in turn."""
        operands = self.operands(length, seed)
        runs = [functools.partial(op.both_passes(), *operands) for op in (baseline, self)]
        slow, fast = median_times(runs, rounds)
        return slow / fast
