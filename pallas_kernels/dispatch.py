"""The choice of an operation's implementation, and checks of its arguments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.names import one_of

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")

# the platform a program is lowered for → its kernel
_KERNELS = {"tpu": "tpu", "cuda": "gpu"}


def check(condition: bool, argument: str, value: Any, allowed: str) -> None:
    """Raise `ValueError`, ``argument=value: allowed``, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {allowed}")


def check_array(argument: str, array: jax.Array, shape: Iterable[int], dtypes: str = "") -> None:
    """Check ``array``'s shape, and that its dtype is floating, or integer if ``dtypes="integer"``.

    Raises:
      ValueError: names the argument, its value and what is required.
    """
    shape = tuple(shape)
    check(array.shape == shape, f"{argument}.shape", array.shape, f"must be {shape}")
    kind = jax.numpy.integer if dtypes == "integer" else jax.numpy.floating
    allowed = "must be an integer type" if dtypes == "integer" else "must be a floating type"
    check(jax.numpy.issubdtype(array.dtype, kind), f"{argument}.dtype", str(array.dtype), allowed)


def choose(op: str, implementation: str | None, refusals: Mapping[str, str | None]) -> list[str]:
    """The implementations that may run: the named one, or all that support the call.

    Args:
      op: the name of the operation, for messages.
      implementation: one of `IMPLEMENTATIONS`, or None.
      refusals: implementation → what it does not support in this call; None if it supports it.

    Raises:
      ValueError: an unknown implementation, or a named one that does not support the call.
    """
    if implementation is None:
        return [name for name, reason in refusals.items() if reason is None]
    if implementation not in IMPLEMENTATIONS:
        allowed = f"must be None or {one_of(implementation, IMPLEMENTATIONS)}"
        raise ValueError(f"implementation={implementation!r}: {allowed}")
    reason = refusals.get(implementation)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r}: {op} does not support {reason}")
    return [implementation]


def per_platform(chosen: Sequence[str], table: Mapping[str, Callable], *operands: Any) -> Any:
    """Run the only implementation in ``chosen``, or the one of the platform that is lowered for.

    Args:
      chosen: from `choose`.
      table: implementation → function of ``operands``; all give the same shapes and dtypes.
    """
    if len(chosen) == 1:
        return table[chosen[0]](*operands)
    kernels = {p: table[name] for p, name in _KERNELS.items() if name in chosen and name in table}
    return jax.lax.platform_dependent(*operands, default=table["xla"], **kernels)
