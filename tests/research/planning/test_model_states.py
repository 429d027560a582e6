"""Model states of a compiled step against the paper's formula, on devices made for it."""

SCRIPT = """
import jax, pytest
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.parallel import MeshConfig, make_mesh
from research.parallel.devices import first_devices
from research.planning.model_states import model_states
from research.parallel.zero import MIXED, bytes_per_parameter
from research.training import TrainingConfig, train

devices = first_devices(4)
assert len(devices) == len(jax.devices()) == 4, "the CPU was not asked before"
assert first_devices(3) == devices[:3]
with pytest.raises(ConfigError, match="^devices=5: this process has 4; set XLA_FLAGS=--xla_force"):
    first_devices(5)

MODEL = DecoderConfig(
    vocab_size=256, width=64, num_layers=1, mlp=MlpConfig(256),
    attention=AttentionConfig(num_heads=4, implementation="reference"),
    param_dtype="bfloat16", dtype="bfloat16",
)
MASTERS = TrainingConfig(steps=2)
for stage, sizes in ((0, dict(data=2)), (2, dict(data=1, fsdp=2, zero=2))):
    config = MeshConfig(**sizes)
    mesh = make_mesh(config, devices[:2])
    found = model_states(MODEL, MASTERS, mesh, config.zero_stage, batch_size=2, sequence_length=16)
    want = bytes_per_parameter(stage, 2, *MIXED)
    assert abs(found.held / found.parameters / want - 1) < 0.02, (stage, found, want)
    assert found.sent is None, "a CPU's collectives are not those meant"
with pytest.raises(ConfigError, match="^batch_size=3: must be a multiple of mesh"):
    model_states(MODEL, MASTERS, mesh, 2, batch_size=3, sequence_length=16)

# trained on some of the devices
task = SyntheticConfig(task="copy", vocab_size=64)
DATA = DataConfig(source="synthetic", sequence_length=16, batch_size=2, synthetic=task)
model = train(MODEL, DATA, TrainingConfig(steps=1, eval_batches=0), devices=devices[2:3]).model
assert jax.tree.leaves(model)[0].devices() == {devices[2]}
print("passed")
"""


def test_what_is_kept_is_the_formula_on_the_devices_asked_for(run_script):
    assert run_script(SCRIPT, devices=1).endswith("passed\n")
