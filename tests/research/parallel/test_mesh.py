"""Meshes and batches that cannot be are refused with the numbers, before any compile."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.attention import AttentionConfig
from layers.config import ConfigError, from_mapping
from layers.decoder import DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from research.parallel import MeshConfig, validate
from research.parallel.mesh import AXES

MODEL = DecoderConfig(
    vocab_size=64,
    width=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2),
    mlp=MlpConfig(64),
)


class _Shape:
    """Stands for a mesh of this shape: `validate` reads nothing else, and no devices are needed."""

    def __init__(self, **sizes):
        self.shape = {name: sizes.get(name, 1) for name in AXES}


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=6, max_size=6), st.integers(0, 5))
def test_the_open_axis_takes_what_is_left(sizes, open_axis):
    config = dict(zip(AXES, sizes, strict=True))
    want = math.prod(sizes)
    config[AXES[open_axis]] = -1
    assert MeshConfig(**config).sizes(want) == dict(zip(AXES, sizes, strict=True))


def test_sizes_that_do_not_fit_name_the_numbers():
    with pytest.raises(ConfigError, match=r"fsdp=3: requires 3 devices, there are 8"):
        MeshConfig(data=1, fsdp=3).sizes(8)
    with pytest.raises(ConfigError, match=r"3 must divide the number of devices, 8"):
        MeshConfig(data=-1, fsdp=3).sizes(8)
    with pytest.raises(ConfigError, match=r"mesh.tensor=0: must be > 0, or -1 for all"):
        from_mapping(MeshConfig, {"tensor": 0}, "mesh")
    with pytest.raises(ConfigError, match="at most one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match="mesh.tensr=2: no such field; did you mean 'tensor'"):
        from_mapping(MeshConfig, {"tensr": 2}, "mesh")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tensor": 4}, "attention.num_kv_heads=2: must be a multiple of mesh.tensor=4"),
        ({"tensor": 3}, "attention.num_heads=8: must be a multiple of mesh.tensor=3"),
        (
            {"data": 3},
            "batch_size=8: must be a multiple of mesh.stage×data×fsdp×expert=3",
        ),
        (
            {"data": 4, "fsdp": 4},
            "batch_size=8: must be a multiple of mesh.stage×data×fsdp×expert=16",
        ),
        ({"sequence": 3}, "sequence_length=16: must be a multiple of mesh.sequence=3"),
        ({"expert": 2}, "mesh.expert=2: must be 1: the model has no experts"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_or_the_batch(sizes, message):
    with pytest.raises(ConfigError, match=message):
        validate(MODEL, _Shape(**sizes), batch_size=8, sequence_length=16)


def test_one_that_does_passes():
    validate(MODEL, _Shape(data=2, fsdp=2, tensor=2), batch_size=8, sequence_length=16)


def test_a_part_that_no_layer_has_is_not_held_to_the_mesh():
    mamba = dataclasses.replace(
        MODEL, pattern=("mamba",), mamba=MambaConfig(4), moe=MoeConfig(3, 64), position="none"
    )
    validate(mamba, _Shape(tensor=4), batch_size=8, sequence_length=16)  # 2 KV heads, of no layer
    with pytest.raises(ConfigError, match="^mesh.expert=2: must be 1: the model has no experts"):
        validate(mamba, _Shape(expert=2), batch_size=8, sequence_length=16)
    mixed = dataclasses.replace(mamba, feed_forward=("moe",))
    with pytest.raises(ConfigError, match="^moe.num_experts=3: must be a multiple of mesh.expert"):
        validate(mixed, _Shape(expert=2), batch_size=8, sequence_length=16)
