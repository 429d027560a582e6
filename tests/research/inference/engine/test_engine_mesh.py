"""The engine on eight devices: the tokens of one device, and nothing is compiled after warm-up."""

import pytest

SCRIPT = """
import dataclasses, sys
import jax, jax.monitoring, numpy as np
from flax import nnx
from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from layers.state import CacheConfig
from research.inference import SamplingConfig
from research.inference.engine import Engine, EngineConfig, Request, Speculative
from research.parallel import MeshConfig, make_mesh, shardings

BASE = DecoderConfig(
    64, 32, 2, mlp=MlpConfig(64), attention=AttentionConfig(8, 8, window=6), tie_embeddings=False,
    pattern=("attention", "sliding"), init_std=1.0,
)
HYBRID = dataclasses.replace(
    BASE, pattern=("attention", "mamba"), attention=AttentionConfig(8), mamba=MambaConfig(state=4)
)
RWKV = RwkvConfig(head_dim=4, decay_rank=3, rate_rank=3, value_rank=3, gate_rank=3)
RECURRENT = dataclasses.replace(
    BASE, pattern=("mamba2", "rwkv7"), feed_forward=("none", "rwkv7"), rwkv=RWKV, position="none",
    mamba=MambaConfig(state=4, head_dim=8), attention=None, norm="layernorm", norm_bias=True,
)
CONTIGUOUS = EngineConfig(slots=3, max_length=32, chunk=4)
PAGED = dataclasses.replace(CONTIGUOUS, cache=CacheConfig("paged", page=2), prefix=True)
SHARED = dataclasses.replace(CONTIGUOUS, prefix=True)
prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [60, 61, 62], [5] * 14, [1, 2, 3, 4, 5, 6, 7, 8, 30]]
requests = [
    Request(prompt, SamplingConfig(max_new_tokens=10, temperature=t, seed=seed, top_p=0.9), n=2)
    for seed, prompt in enumerate(prompts) for t in (0.0, 1.0)
]


class Even:  # a matcher that allows even tokens
    error, is_done = None, False

    def mask(self):
        return np.arange(64) % 2 == 0

    def masks(self, drafts):
        return np.stack([self.mask()] * (len(drafts) + 1))

    def accept(self, token):
        return True


def constrain(engine):
    engine._matcher = lambda request: Even()
    compiled = []

    def listen(event, _, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    [result] = engine.run(requests[1:2])
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not any(token % 2 for sample in result.samples for token in sample.tokens)
    assert not compiled  # warmed up


def tokens(config, engine_config, devices, drafted=False):
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    mesh = make_mesh(MeshConfig(data=1, tensor=-1), jax.devices()[:devices])
    if devices > 1:
        model = jax.device_put(model, shardings(model, mesh))
    speculative = Speculative(draft=model, tokens=3) if drafted else None
    engine = Engine(model, engine_config, mesh=mesh, speculative=speculative)
    engine.warm_up()
    results = engine.run(requests)
    mixer = engine._runner._memory.states[0][0].mixer
    constrain(engine)
    held = mixer.scan_bhpn if config is RECURRENT else mixer.keys.codes
    assert held.sharding.shard_shape(held.shape)[1] == 8 // devices, held.sharding
    return [sample.tokens for result in results for sample in result.samples]


CASES = {
    "hybrid": (HYBRID, PAGED),
    "contiguous": (BASE, CONTIGUOUS),
    "paged": (BASE, PAGED),
    "recurrent": (RECURRENT, SHARED),
    "drafted": (HYBRID, PAGED),
}
config, engine_config = CASES[sys.argv[1]]
drafted = sys.argv[1] == "drafted"
assert tokens(config, engine_config, 8, drafted) == tokens(config, engine_config, 1, drafted)

try:
    mesh = make_mesh(MeshConfig(data=2, tensor=-1))
    Engine(jax.jit(lambda: Decoder(BASE, rngs=nnx.Rngs(0)))(), CONTIGUOUS, mesh=mesh)
except ConfigError as error:
    print(error)
print("passed")
"""


@pytest.mark.parametrize(
    "case",
    ["hybrid"]
    + [
        pytest.param(case, marks=pytest.mark.slow)
        for case in ("contiguous", "paged", "recurrent", "drafted")
    ],
)
def test_tensor_parallel_tokens_are_those_of_one_device(run_script, case):
    lines = run_script(SCRIPT, case).splitlines()
    refusal = "mesh={'data': 2, 'tensor': 4}: an engine supports the axis tensor only"
    assert lines == [refusal, "passed"]
