"""Two processes of four devices each train as one process, and read each other's checkpoints."""

import json
import socket
import subprocess
import sys

import pytest

from tests.conftest import environment
from tests.research.parallel.test_training import MODEL

RUN = (
    MODEL
    + """
import json
from pathlib import Path

initialize()
assert jax.device_count() == 8
workdir = Path("WORKDIR")
mesh = MeshConfig(**json.loads('MESH'))
training = dataclasses.replace(TRAINING, steps=4, checkpoint_every=2, log_every=1, eval_batches=1)


class Killed(Exception):
    pass


def killed(step, steps, metrics):
    if step == 4:
        raise Killed


if not workdir.joinpath("config.json").exists() and workdir.name == "interrupted":
    try:
        train(MODEL, DATA, training, mesh=mesh, workdir=workdir, progress=killed)
    except Killed:
        pass
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2"]
train(MODEL, DATA, training, mesh=mesh, workdir=workdir, progress=quiet)
print("passed", jax.process_index())
"""
)


def run(tmp_path, name: str, mesh: str, processes: int) -> str:
    """Run `RUN` in ``processes`` processes of 8 devices in all; metrics.jsonl of its workdir."""
    workdir = tmp_path / name
    script = tmp_path / f"{name}.py"
    script.write_text(RUN.replace("WORKDIR", str(workdir)).replace("MESH", mesh))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(processes):
        variables = environment(8 // processes)
        if processes > 1:
            variables |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, script],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for index, output in enumerate(outputs):
        assert f"passed {index}" in output, output[-4000:]
    return (workdir / "metrics.jsonl").read_text()


def test_two_processes_train_checkpoint_and_resume_as_one(tmp_path, run_script):
    mesh = '{"data": 2, "fsdp": 2, "tensor": 2}'
    one = run(tmp_path, "one", mesh, processes=1)
    two = run(tmp_path, "two", mesh, processes=2)
    interrupted = run(tmp_path, "interrupted", mesh, processes=2)
    assert interrupted == two, "a resumed run differs from an uninterrupted one"
    rows = [[json.loads(line) for line in text.splitlines()] for text in (one, two)]
    assert len(rows[0]) == 5
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    # what two processes of four devices saved, one process with one device reads
    same = f"""
import numpy as np, jax
from research.training import load_model
leaves = [
    jax.tree.leaves(load_model("{tmp_path}/" + name)) for name in ("one", "two", "interrupted")
]
for a, b, c in zip(*leaves, strict=True):
    assert len(a.devices()) == 1
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(b, c)
"""
    run_script(same, devices=1)


def test_a_mesh_whose_rows_do_not_divide_over_processes_is_refused(tmp_path):
    """A process brings whole rows, so that ``sequence`` cannot reach across processes."""
    with pytest.raises(
        AssertionError, match="ConfigError: mesh.stage×data×fsdp×expert=1: .* the 2 processes"
    ):
        run(tmp_path, "refused", '{"data": 1, "sequence": 8}', processes=2)
