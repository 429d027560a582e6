"""Which implementation of an op runs, and how a call that cannot be is refused."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.names import one_of

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")

# the platform a program is lowered for → its kernel
_KERNELS = {"tpu": "tpu", "cuda": "gpu"}


def check(condition: bool, argument: str, value: Any, allowed: str) -> None:
    """Raise `ValueError` naming ``argument``, ``value`` and what is ``allowed`` unless it holds."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {allowed}")


def check_array(argument: str, array: jax.Array, shape: Iterable[int], dtypes: str = "") -> None:
    """Check ``array``'s shape, and that its dtype is floating or, if told, ``"integer"``.

    Raises:
      ValueError: names the argument, what it is and what it must be.
    """
    shape = tuple(shape)
    check(array.shape == shape, f"{argument}.shape", array.shape, f"must be {shape}")
    kind = jax.numpy.integer if dtypes == "integer" else jax.numpy.floating
    allowed = "must be an integer type" if dtypes == "integer" else "must be a floating type"
    check(jax.numpy.issubdtype(array.dtype, kind), f"{argument}.dtype", str(array.dtype), allowed)


def choose(op: str, implementation: str | None, refusals: Mapping[str, str | None]) -> list[str]:
    """The implementations that may run: the named one, or all of ``refusals`` that can serve.

    Args:
      op: the op's name, for messages.
      implementation: one of `IMPLEMENTATIONS`, or None.
      refusals: implementation → why it cannot serve this call, or None if it can.

    Raises:
      ValueError: an unknown implementation, or a named one that cannot serve.
    """
    if implementation is None:
        return [name for name, reason in refusals.items() if reason is None]
    if implementation not in IMPLEMENTATIONS:
        allowed = f"must be None or {one_of(implementation, IMPLEMENTATIONS)}"
        raise ValueError(f"implementation={implementation!r}: {allowed}")
    reason = refusals.get(implementation)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r}: {op} cannot serve it: {reason}")
    return [implementation]


def per_platform(chosen: Sequence[str], table: Mapping[str, Callable], *operands: Any) -> Any:
    """Run the one implementation ``chosen``, or the lowering platform's among several.

    Args:
      chosen: from `choose`.
      table: implementation → function of ``operands``; all give the same shapes and dtypes.
    """
    if len(chosen) == 1:
        return table[chosen[0]](*operands)
    kernels = {p: table[name] for p, name in _KERNELS.items() if name in chosen and name in table}
    return jax.lax.platform_dependent(*operands, default=table["xla"], **kernels)
