"""Sizes that no memory holds are refused before anything is allocated."""

import dataclasses
import resource
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research import memory
from research.data import DataConfig, SyntheticConfig
from research.models import load, save
from research.parallel import MeshConfig, make_mesh
from research.training import OptimizerConfig, TrainingConfig, check, load_model, train
from research.training.check import check_run

MODEL = DecoderConfig(
    vocab_size=16, width=8, num_layers=2, attention=AttentionConfig(num_heads=2), mlp=MlpConfig(16)
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=8,
    batch_size=2,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)
TRAINING = TrainingConfig(steps=1, eval_batches=0)


@pytest.mark.parametrize(
    "model, data",
    [
        (dict(width=4 * 10**9), {}),
        (dict(width=2**62), {}),
        (dict(num_layers=10**9, scan=False), {}),  # too many even to count one by one
        (dict(num_layers=10**15), {}),
        (dict(vocab_size=10**12), {}),
        (dict(mlp=MlpConfig(2**62)), {}),  # more elements than an index can number
        (dict(attention=AttentionConfig(num_heads=2, head_dim=2**40)), {}),
        (dict(position="learned", max_length=10**13), {}),
        ({}, dict(batch_size=10**10)),
        ({}, dict(source="stdlib", sequence_length=10**10)),
        ({}, dict(source="stdlib", batch_size=2**40, sequence_length=2**40)),
    ],
)
def test_sizes_beyond_the_memory_are_one_line(model, data, tmp_path):
    if data:
        model = dict(vocab_size=300)
    parts = dataclasses.replace(MODEL, **model), dataclasses.replace(DATA, **data)
    with pytest.raises(ConfigError, match="per device, must fit into .* of memory$") as caught:
        train(*parts, TRAINING, workdir=tmp_path / "run")
    said = str(caught.value)
    assert said.startswith("data.batch_size=" if data else "model=") and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_the_bytes_are_those_of_parameters_moments_and_gradients(monkeypatch):
    """Adam's two moments and a gradient for each parameter, in float32; all but a few scalars."""
    limit = {}
    monkeypatch.setattr(memory, "host_memory", lambda: limit["bytes"])
    shapes = [(16, 8), *[(8, 8)] * 8, *[(8, 16)] * 6, *[(8,)] * 5]  # all matrices and norms
    count = sum(jnp.zeros(shape).size for shape in shapes)
    mesh = make_mesh(devices=jax.devices()[:1])

    def checked(model, rows=2):
        check_run(model, TRAINING, MeshConfig(), mesh, batch_size=rows, sequence_length=8)

    for scan in (True, False):
        model = dataclasses.replace(MODEL, scan=scan)
        limit["bytes"] = 4 * 4 * count - 1
        with pytest.raises(ConfigError, match=rf"^model={count:,} parameters: with gradients and"):
            checked(model)
        limit["bytes"] += 100  # the step, its key and the moments' count
        checked(model)
    # five arrays of a batch, and the input of each layer
    rows = limit["bytes"] // (8 * (5 * 4 + MODEL.num_layers * MODEL.width * 4)) + 1
    with pytest.raises(ConfigError, match=rf"^data.batch_size={rows}, data.sequence_length=8: a"):
        checked(MODEL, rows)
    checked(MODEL, rows - 1)


@pytest.mark.parametrize(
    "training, arrays",
    [
        (dict(optimizer=OptimizerConfig(clip_norm=None)), 3),  # each gradient is used at once
        (dict(optimizer=OptimizerConfig(clip_norm=None), gradient_accumulation=2), 4),
    ],
)
def test_gradients_count_only_if_all_are_stored(monkeypatch, training, arrays):
    model = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    size, limit = memory.shard_bytes(model), {}
    monkeypatch.setattr(memory, "host_memory", lambda: limit["bytes"])
    training = dataclasses.replace(TRAINING, **training)
    mesh = make_mesh(devices=jax.devices()[:1])
    limit["bytes"] = arrays * size - 1
    with pytest.raises(ConfigError, match="^model="):
        check_run(MODEL, training, MeshConfig(), mesh, batch_size=2)
    limit["bytes"] += 100
    check_run(MODEL, training, MeshConfig(), mesh, batch_size=2)


@pytest.mark.parametrize(
    "model, patterns",
    [(dict(remat="full_offload"), ("*",)), ({}, ("*final_norm*",))],  # offloaded, not needed
)
def test_only_inputs_that_are_stored_on_the_device_count(monkeypatch, model, patterns):
    monkeypatch.setattr(check, "check_host", lambda *_: None)  # as if this were no CPU
    monkeypatch.setattr(memory, "host_memory", lambda: limit)
    mesh = make_mesh(devices=jax.devices()[:1])
    rows, arrays = 10**6, 5 * 4 * 8
    limit = rows * arrays
    model = dataclasses.replace(MODEL, **model)

    def checked(rows):
        sizes = dict(batch_size=rows, sequence_length=8, patterns=patterns)
        check_run(model, TRAINING, MeshConfig(), mesh, **sizes)

    checked(rows)
    with pytest.raises(
        ConfigError, match="^data.batch_size=.*: a batch, 0.160 GB per device, must"
    ):
        checked(rows + 1)


def test_an_example_that_does_not_fit_is_not_generated():
    with pytest.raises(ConfigError, match="^sequence_length=1000000000000: an example, 64,000 GB"):
        dataclasses.replace(DATA, sequence_length=10**12)


def test_a_checkpoint_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    train(MODEL, DATA, TRAINING, workdir=tmp_path, progress=lambda *_: None)
    size = memory.shard_bytes(load_model(tmp_path))
    count = len(make_mesh().local_devices)
    monkeypatch.setattr(memory, "host_memory", lambda: count * size)
    load_model(tmp_path)  # without moments
    monkeypatch.setattr(memory, "host_memory", lambda: 1000 * count)
    with pytest.raises(ConfigError, match=r"^workdir=.*: its model, .* must fit into 0.001 MB"):
        load_model(tmp_path)


def test_an_imported_model_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    save(Decoder(MODEL, rngs=nnx.Rngs(0)), tmp_path / "theirs", "llama")
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^model=.*theirs.: its parameters, 0.005\d* MB per dev"):
        load(tmp_path / "theirs")


def test_only_the_shards_of_a_device_count():
    mesh = make_mesh(devices=jax.devices()[:1])
    whole = jax.ShapeDtypeStruct((6, 4), jnp.bfloat16)
    placed = jax.ShapeDtypeStruct(
        (6, 4), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    assert memory.shard_bytes([whole, placed]) == 2 * 6 * 4 * 2


def test_memory_that_a_device_does_not_tell_is_not_checked(monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    stats = {"bytes_limit": 10}
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    ours = types.SimpleNamespace(devices=mesh.devices, local_devices=[gpu])
    monkeypatch.setattr(memory, "host_memory", lambda: 0)
    memory.check_memory(10, ours, "model=1", "its parameters")
    with pytest.raises(ConfigError, match="^model=1: its parameters, 0.000011 MB per dev"):
        memory.check_memory(11, ours, "model=1", "its parameters")
    stats = None  # another allocator
    memory.check_memory(11, ours, "model=1", "its parameters")


def test_arrays_of_a_single_device_count():
    assert memory.shard_bytes({"a": jnp.zeros((6, 4)), "b": np.zeros(3, np.int8)}) == 99


@pytest.mark.parametrize(
    "line, name, root",
    [("0::/jobs/7", "memory.max", ""), ("4:cpu,memory:/jobs/7", "memory.limit_in_bytes", "memory")],
)
def test_the_limits_of_the_process_count(monkeypatch, tmp_path, line, name, root):
    unlimited = memory.host_memory()
    cgroup = tmp_path / "cgroup"
    cgroup.write_text(f"1:pids:/other\n{line}\n")
    root = tmp_path / root
    (root / "jobs/7").mkdir(parents=True)
    (root / "jobs/7" / name).write_text("max\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", cgroup)
    assert memory.host_memory() >= unlimited
    (root / "jobs" / name).write_text("6000000\n")  # of all jobs together
    assert memory.host_memory() == 6_000_000
    (root / "jobs/7" / name).write_text("5000000\n")
    assert memory.host_memory() == 5_000_000
    limit = lambda kind: (4_000_000, resource.RLIM_INFINITY)  # noqa: E731
    monkeypatch.setattr(resource, "getrlimit", limit)
    assert memory.host_memory() == 4_000_000
