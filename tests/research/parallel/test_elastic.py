"""A run goes on upon fewer and upon more devices, other meshes and other stages of ZeRO."""

import json

import pytest

from tests.research.parallel.test_training import MODEL

# 8 → 4 → 1 → 8 devices; each part but the last is preempted two steps on
PARTS = (
    (8, '{"data": 2, "fsdp": 2, "tensor": 2}'),
    (4, '{"data": 1, "fsdp": 4, "zero": 1}'),
    (1, "{}"),
    (8, '{"data": 2, "fsdp": 2, "sequence": 2, "zero": 2}'),
)
RUN = (
    MODEL
    + """
import json, signal, sys
from research.training import Preempted

workdir, mesh, stop = sys.argv[1], MeshConfig(**json.loads(sys.argv[2])), int(sys.argv[3])
training = dataclasses.replace(TRAINING, steps=8, log_every=1, eval_batches=1, eval_every=4)
done = []


def told(step, steps, metrics):
    done.append(step)
    if step == stop:
        signal.raise_signal(signal.SIGTERM)


try:
    train(MODEL, DATA, training, mesh=mesh, workdir=workdir, progress=told)
except Preempted:
    pass
print(jax.device_count(), done)
"""
)


@pytest.mark.slow
def test_the_loss_curve_does_not_depend_on_where_it_was_computed(tmp_path, run_script):
    run_script(RUN, tmp_path / "alone", PARTS[0][1], 0, devices=8)
    for number, (devices, mesh) in enumerate(PARTS):
        stop = 2 * number + 2
        told = run_script(RUN, tmp_path / "moved", mesh, stop, devices=devices)
        assert told == f"{devices} {[stop - 1, stop]}\n"
    alone, moved = (
        [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "moved")
    )
    assert [row["step"] for row in moved] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert moved[0]["loss"] > moved[8]["loss"]
    for a, b in zip(alone, moved, strict=True):
        assert a == pytest.approx(b, rel=2e-5)
