"""Time of the first step and memory of one contestant of `research.benchmark.train`.

It is measured in a process that does nothing else:

python -m research.benchmark.alone width256 "torch eager"
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from layers.config import ConfigError
from research.benchmark import step, subject

STEPS = 3  # after the first; memory is measured over these
_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(case: str, who: str) -> dict[str, Any]:
    """The first step's time and the memory of contestant ``who``, measured in a new process.

    ``compile_seconds``: of the first step, including compilation, without a cache on disk.
    ``peak_bytes``: the largest resident set over the following steps, minus the resident set before
    the model was created. It includes weights, moments, gradients, activations, compiled code and
    what compilation left in memory. ``first_peak_bytes``: the same over the creation of the model
    and the first step. Both are None if Linux does not give them.

    Raises:
      ConfigError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
        command = [sys.executable, "-m", __name__, case, who]
        completed = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    if completed.returncode:
        last_line = (
            completed.stderr.strip() or f"exit status {completed.returncode}"
        ).splitlines()[-1]
        raise ConfigError(f"case={case!r}: {who} failed in its process: {last_line}")
    return json.loads(completed.stdout.splitlines()[-1])


def _resident(field: str) -> int | None:
    """Bytes of ``VmRSS``, the resident set, or ``VmHWM``, its maximum since the last reset."""
    if not _STATUS.exists():
        return None
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    return None if match is None else 1024 * int(match[1])


def _reset_peak() -> bool:
    """Reset `VmHWM`, after freeing unused memory; whether Linux supports it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _REFS.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def main(case: str, who: str) -> dict[str, Any]:
    """What `measure` returns, measured in this process."""
    if who == step.OURS:
        jax.jit(lambda x: x + 1)(1.0)  # initialises the backend
    else:
        import torch

        torch.ones(8, requires_grad=True).sum().backward()
    supported = _reset_peak()
    before = _resident("VmRSS") or 0
    prepared = subject.prepare(who, subject.SIZES[case], None)
    started = time.perf_counter()
    prepared.run()
    seconds = time.perf_counter() - started + (prepared.compile_seconds or 0.0)
    first = _resident("VmHWM") or 0
    supported = _reset_peak() and supported
    for _ in range(STEPS):
        prepared.run()
    peak = _resident("VmHWM") or 0
    return {
        "compile_seconds": seconds,
        "first_peak_bytes": first - before if supported else None,
        "peak_bytes": peak - before if supported else None,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
