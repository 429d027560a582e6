"""Stop a run whose loss or gradient is not finite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.files import write_atomically


class DivergenceError(RuntimeError):
    """The loss or the gradient is not finite; the message names the step and the batch."""


def check_finite(
    step: int,
    metrics: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    workdir: Path | None,
) -> None:
    """Raise `DivergenceError` unless loss and gradient norm of ``step`` are finite.

    The batch is written to ``workdir`` as ``diverged-<step>.npz``, for inspection.
    """
    not_finite = [name for name in ("loss", "gradient_norm") if not np.isfinite(metrics[name])]
    if not not_finite:
        return
    note = ""
    if workdir is not None:
        path = workdir / f"diverged-{step}.npz"
        arrays: Any = {name: np.asarray(value) for name, value in batch.items()}
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))
        note = f", its batch is in {path.name}"
    numbers = ", ".join(f"{name}={metrics[name]}" for name in not_finite)
    raise DivergenceError(
        f"step {step}: {numbers}{note}; the last checkpoint is from an earlier step"
    )
