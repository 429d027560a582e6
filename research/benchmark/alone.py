"""First step and memory of one contestant of `research.benchmark.train`, alone in a process.

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

STEPS = 3  # after the first, over which memory is taken
_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(case: str, who: str) -> dict[str, Any]:
    """``compile_seconds``: of the first step, compiling included, with no cache on the disk.

    ``peak_bytes``: by how much the largest resident set over the steps after that exceeds what the
    process held before its model was there: weights, moments, gradients, activations, compiled code
    and what compiling left behind. ``first_peak_bytes``: the same over model and first step. Both
    None where Linux does not say.

    Raises:
      ConfigError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
        command = [sys.executable, "-m", __name__, case, who]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ConfigError(f"{case}: {who} alone in a process: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> int | None:
    """``VmRSS``, now, or ``VmHWM``, the most since it was last set back."""
    if not _STATUS.exists():
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    return None if found is None else 1024 * int(found[1])


def _set_back() -> bool:
    """Begin `VmHWM` anew, without what malloc keeps for itself; whether Linux lets us."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _REFS.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def main(case: str, who: str) -> dict[str, Any]:
    """What `measure` says, of this process."""
    if who == step.OURS:
        jax.jit(lambda x: x + 1)(1.0)  # the backend is there
    else:
        import torch

        torch.ones(8, requires_grad=True).sum().backward()
    known = _set_back()
    before = _resident("VmRSS") or 0
    prepared = subject.prepare(who, subject.SIZES[case], None)
    begin = time.perf_counter()
    prepared.run()
    seconds = time.perf_counter() - begin + (prepared.compile_seconds or 0.0)
    first = _resident("VmHWM") or 0
    known = _set_back() and known
    for _ in range(STEPS):
        prepared.run()
    peak = _resident("VmHWM") or 0
    return {
        "compile_seconds": seconds,
        "first_peak_bytes": first - before if known else None,
        "peak_bytes": peak - before if known else None,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
