"""Programs for TPUs that are not here: refused slices, and a whole sharded training step."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.parallel import MeshConfig, use_mesh
from research.planning.topology import compile_for_tpu, compile_with_text, topology_mesh
from research.training import TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state
from research.training.step import make_step

pytestmark = pytest.mark.tpu_compile

MODEL = DecoderConfig(
    vocab_size=256,
    width=256,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=128),
    mlp=MlpConfig(width=512),
    dtype="bfloat16",
    scan=True,
)


def test_an_unknown_slice_is_one_line():
    before = dict(os.environ)
    for name in ("v5x:2x2", "nonsense"):
        with pytest.raises(ConfigError, match=f"^topology='{name}': ") as caught:
            topology_mesh(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="tensor=3: requires 3 devices, there are 4"):
        topology_mesh("v5e:2x2", MeshConfig(data=1, tensor=3))
    assert dict(os.environ) == before


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="topology='v5e:2x2': requires the TPU compiler: pip in"):
        topology_mesh("v5e:2x2")


def test_a_program_has_its_text_also_where_its_lookup_goes_to_a_sparsecore():
    place = NamedSharding(topology_mesh("v5p:1x1x1"), PartitionSpec())
    table = jax.ShapeDtypeStruct((50_304, 1024), jnp.bfloat16, sharding=place)
    ids = jax.ShapeDtypeStruct((65_536,), jnp.int32, sharding=place)
    _, text = compile_with_text(lambda table, ids: table.at[ids].get(mode="clip"), table, ids)
    assert text.count("ENTRY") == 1 and "bf16[50304,1024]" in text and "bf16[65536,1024]" in text
    compiled, text = compile_with_text(lambda ids: 2 * ids, ids)
    assert "s32[65536]" in text and "s32[65536]" in str(compiled.as_text())


@pytest.mark.parametrize(
    "slice_name",
    ["v5e:2x2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("v5p:2x2x1", "v6e:2x2"))],
)
def test_a_sharded_training_step_holds_the_kernels(slice_name):
    """Forward, dQ and dK/dV run on each chip's own heads and rows: none is left to XLA."""
    mesh = topology_mesh(slice_name, MeshConfig(data=1, fsdp=2, tensor=2))
    training = TrainingConfig(steps=10)
    state = abstract_state(MODEL, make_optimizer(training.optimizer, training.steps), mesh)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    batch = {
        name: jax.ShapeDtypeStruct((4, 1024), dtype, sharding=rows)
        for name, dtype in (
            ("tokens", jnp.int32), ("targets", jnp.int32), ("positions", jnp.int32),
            ("segment_ids", jnp.int32), ("weights", jnp.float32),
        )
    }  # fmt: skip
    with use_mesh(mesh):
        text = compile_for_tpu(make_step(training), state, batch).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    # a kernel's operands: 4 / fsdp rows, 4 / tensor heads
    kernel = next(line for line in text.splitlines() if "tpu_custom_call" in line)
    assert "bf16[2,2,1024,128]" in kernel
