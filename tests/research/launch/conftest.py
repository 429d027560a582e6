"""Stand-ins for a cluster's commands, found before those that may be on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

LAUNCH = Path(__file__).parents[3] / "research" / "launch"

# Joins the other processes, and adds up over all of them what only one knows. Prints what it was
# called with, and which of a node's GPUs JAX would take.
JOINS = """
import os
import sys
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from research.parallel import initialize

initialize()
indices = multihost_utils.process_allgather(jnp.asarray(jax.process_index()))
gpus = jax.config._read("jax_cuda_visible_devices")
told = [jax.process_index(), jax.process_count(), jax.device_count(), int(indices.sum()), gpus]
# in one write: the processes share a pipe, and print writes the end of its line apart
sys.stdout.write(" ".join(map(str, [*told, *sys.argv[1:]])) + "\\n")
"""


@pytest.fixture
def stubs(tmp_path):
    """``stubs(devices, **scripts)``: an environment whose commands of these names are ``scripts``.

    Text that begins with ``#!`` is taken as it is, other text is Python's.
    """

    def make(devices: int, **scripts: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in scripts.items():
            path = folder / name
            path.write_text(text if text.startswith("#!") else f"#!{sys.executable}\n{text}")
            path.chmod(0o755)
        variables = environment(devices)
        return {**variables, "PATH": f"{folder}:{variables['PATH']}"}

    return make


def call(words, variables, timeout=600):
    """Run ``words``; the finished process with its output."""
    return subprocess.run(
        list(map(str, words)), env=variables, capture_output=True, text=True, timeout=timeout
    )
