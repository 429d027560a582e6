"""An engine with loaded programs: the results of one that compiles, and no compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig
from research.inference import SamplingConfig
from research.inference.engine import Engine, EngineConfig, Request
from research.inference.engine.compiled import load_programs, save_programs

MODEL = DecoderConfig(
    18, 16, 2, attention=AttentionConfig(4, 2), mamba=MambaConfig(3, convolution=3),
    mlp=MlpConfig(24), pattern=("attention", "mamba"), init_std=1.0,
)  # fmt: skip
CONFIG = EngineConfig(
    slots=2, max_length=24, chunk=4, cache=CacheConfig("paged", page=2), prefix=True
)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
REQUESTS = [
    Request(PROMPT, SamplingConfig(6, temperature=0.8, top_p=0.9, logprobs=2), n=2, echo=True),
    Request([*PROMPT, 3], SamplingConfig(5, temperature=0)),
    Request([*PROMPT, 3], SamplingConfig(5, seed=1, frequency_penalty=0.5)),  # a shared prefix
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Programs that were compiled without weights, of layers that are stacked."""
    folder = tmp_path_factory.mktemp("compiled") / "DIR"
    abstract = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    save_programs(folder, abstract, CONFIG)
    return folder


def make(seed=0, config=MODEL):
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(seed)))()


def results(engine):
    found = engine.run(REQUESTS)
    return [(r.samples, r.prompt_logprobs, r.prompt_top) for r in found]


def test_an_engine_with_loaded_programs_compiles_nothing(folder):
    compiled = []

    def listen(event: str, duration_secs: float, **_):
        if "backend_compile" in event:
            compiled.append(event)

    models = [make(seed) for seed in (0, 1)]
    jitted = Engine(models[0], CONFIG)
    expected = results(jitted)
    programs = load_programs(folder, models[0], CONFIG)
    engines = [Engine(model, CONFIG, compiled=programs) for model in models]  # new weights, too
    some = {name: programs[name] for name in ("admit", "decode")}
    with pytest.raises(ConfigError, match=r"^compiled=\['admit', 'decode'\]: must hold \['admit'"):
        Engine(models[0], CONFIG, compiled=some)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        load_programs(folder, models[0], dataclasses.replace(CONFIG, queue=3, snapshots=5))
        for engine in engines:
            engine.warm_up()
        found = [results(engine) for engine in engines]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert found[0] == expected != found[1]
    assert jitted.stats.shared == engines[0].stats.shared > 0


def other(**fields):
    return dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    "model, config, message",
    [
        ({}, other(slots=3), "source.engine.slots=3: '.*' has 2; compile it again"),
        ({}, other(max_length=28), "source.engine.max_length=28: '.*' has 24; compile it again"),
        ({}, other(chunk=8), "source.engine.chunk=8: '.*' has 4; compile it again"),
        ({}, other(prefix=False), "source.engine.prefix=False: '.*' has True; compile it again"),
        ({}, other(cache=CacheConfig("paged", page=2, dtype="int8")),
         "source.engine.cache.dtype='int8': '.*' has None; compile it again"),
        (dict(norm_eps=1e-3), CONFIG, "source.model.norm_eps=0.001: '.*' has 1e-06; compile it"),
    ],
)  # fmt: skip
def test_programs_of_another_engine_are_refused_by_name(folder, model, config, message):
    abstract = dataclasses.replace(MODEL, **model)
    weights = jax.eval_shape(lambda: Decoder(abstract, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_programs(folder, weights, config)


def test_weights_of_another_shape_or_dtype_are_refused_by_name(folder):
    weights = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), weights)
    with pytest.raises(
        ConfigError, match=r"^source.weights.blocks/0/mixer/\w+/\w+/array='bfloat16\["
    ):
        load_programs(folder, half, CONFIG)


MESH = """
import sys
from pathlib import Path
import jax
from flax import nnx
from layers.decoder import Decoder
from research.inference.engine import Engine, EngineConfig
from research.inference.engine.compiled import load_programs, save_programs
from research.parallel import MeshConfig, make_mesh, shardings
from tests.research.inference.engine.test_compiled import MODEL, make, other, results
from layers.config import ConfigError
import dataclasses

model_config = dataclasses.replace(MODEL, pattern=("attention",), mamba=None)
mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
abstract = jax.eval_shape(lambda: Decoder(model_config, rngs=nnx.Rngs(0)))
abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        abstract, shardings(abstract, mesh))
config = other()
save_programs(Path(sys.argv[1]), abstract, config, mesh=mesh)
model = jax.device_put(make(config=model_config), shardings(abstract, mesh))
expected = results(Engine(model, config, mesh=mesh))
for portable in (False, True):
    programs = load_programs(Path(sys.argv[1]), model, config, mesh=mesh, portable=portable)
    assert results(Engine(model, config, mesh=mesh, compiled=programs)) == expected
try:
    load_programs(Path(sys.argv[1]), make(config=model_config), config)
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_engine_on_a_mesh_loads_its_programs(run_script, tmp_path):
    out = run_script(MESH, tmp_path / "DIR")
    assert out.startswith("source.devices=1: ") and "has 2; compile it again" in out
