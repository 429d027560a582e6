"""Compiled engines: programs that are built once and run by many processes (Frostig 2018, JAX).

JAX traces a Python function once for each set of shapes, and XLA compiles what was traced. A long
run pays this once; a server pays it again at each start. An engine that is built ahead of time and
loaded, as TensorRT's, avoids it. JAX can write executables too, and beside them the programs before
XLA, which are portable (`jax.export`).

Here an engine of a decoder with random weights becomes ready, from weights in memory to the end of
its warm-up, in four ways: jit traces and compiles all programs; jit traces them, and finds them in
JAX's cache on disk; executables are loaded from a folder (`ablate compile`); the portable programs
of this folder are compiled. What JAX has in memory is forgotten before each. All serve the same
requests, and log-probabilities are compared bit for bit. The folder is written without weights; its
programs then serve two sets of them. Compilations are counted while programs are loaded, warmed up
and serve; one more small program makes the empty memory of an engine. Fields of the folder's stamp
are changed one at a time, and each must be refused by its name.

    ablate run efficiency/compiled_engine --scale=smoke    # a tiny model, no findings
    ablate run efficiency/compiled_engine                  # cpu: 2 cores; time in `ablate list`
    ablate run efficiency/compiled_engine --scale=gpu      # one accelerator
    ablate run efficiency/compiled_engine --scale=paper    # 13B; 4 chips of TPU v5p
"""

import dataclasses
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import from_mapping
from research.ablation import Arm, Claim, Unit, mean, ratio
from research.ablation.serving import greedy, random_decoder, random_prompt, serving_model
from research.ablation.startup import compilations, not_refused, start, start_with_cache
from research.inference.engine import Engine, EngineConfig
from research.inference.engine.compiled import load_programs, save_programs

PAPER = (
    "Frostig 2018, Compiling machine learning programs via high-level tracing, SysML; the JAX "
    "authors, jax.export and jax.experimental.serialize_executable"
)
CODE = ("research/inference/engine/compiled.py", "research/inference/compiled/store.py")
MATCHED = "weights, requests and the engine's configuration"
SEEDS = (0, 1, 2, 3, 4)
TOPOLOGY = "v5p:2x2x1"  # the slice of paper scale
PAPER_ARMS = ("jit",)  # all arms run the same programs
LOADED = ("executable", "portable")
FOLDER = "compiled"

# fields of a stamp that are changed, one at a time: versions, devices, configurations, a weight
CHANGED = (
    ("machine", "jax"), ("machine", "jaxlib"), ("source", "code"), ("source", "platform"),
    ("source", "devices"), ("machine", "device"), ("machine", "ids"), ("machine", "topology"),
    ("source", "model", "width"), ("source", "model", "norm_eps"), ("source", "engine", "slots"),
    ("source", "engine", "cache", "dtype"), ("source", "weights", "final_norm/scale"),
)  # fmt: skip


def get_config(scale):
    config = serving_model(scale)
    smoke = scale == "smoke"
    sizes = dict(slots=2, max_length=32, chunk=16) if smoke else dict(max_length=512, chunk=128)
    fields = {**sizes, "cache": dict(kind="paged"), "prefix": True}
    config.engine = dataclasses.asdict(from_mapping(EngineConfig, fields, "engine"))
    served = dict(count=2, prompt=12, new=4) if smoke else dict(count=12, prompt=200, new=32)
    config.requests = served
    if scale == "paper":
        config.mesh = dict(data=1, tensor=4)
    return config


ARMS = (Arm("jit"), Arm("cached"), Arm("executable"), Arm("portable", after=("executable",)))


def _same(arm):
    def apart(results):
        ours, theirs = (results.metric(name, "logprobs") for name in (arm, "jit"))
        return np.abs(ours - theirs).max(axis=1)

    return Claim(
        f"same_{arm}",
        f"Every log-probability of the {arm} programs is, bit for bit, that of jit's",
        paper="none: the programs are the same",
        measure=apart,
        comparison="within",
        margin=0.0,
        deterministic=True,
    )


CLAIMS = (
    Claim(
        "load",
        "With loaded executables an engine is ready in less than a quarter of jit's time",
        paper="a traced program is compiled once for all calls; no number is given",
        measure=ratio("ready_seconds", "executable", "jit"),
        comparison="<",
        margin=0.25,
    ),
    Claim(
        "load_cached",
        "With loaded executables an engine is ready in less time than with jit and a full cache",
        paper="none: a cache on disk leaves tracing and lowering",
        measure=ratio("ready_seconds", "executable", "cached"),
        comparison="<",
        margin=1.0,
    ),
    *map(_same, LOADED),
    Claim(
        "new_weights",
        "With other weights, loading, warming up and serving compile nothing",
        paper="none",
        measure=mean("compilations", "executable"),
        comparison="within",
        margin=0.0,
        deterministic=True,
    ),
    Claim(
        "size",
        "All executables together take less than 5% of the weights' bytes",
        paper="none",
        measure=mean("size_ratio", "executable"),
        comparison="<",
        margin=0.05,
    ),
    Claim(
        "refused",
        "Each changed version, device, configuration and weight is refused by its name",
        paper="none",
        measure=mean("not_refused", "executable"),
        comparison="within",
        margin=0.0,
        deterministic=True,
    ),
)


def run(unit: Unit):
    config = from_mapping(EngineConfig, unit.config.engine, "engine")
    model, folder = random_decoder(unit), unit.workdir / FOLDER
    if unit.arm == "jit":
        engine, seconds = start(model, config)
        return {"ready_seconds": seconds, "logprobs": _logprobs(unit, engine)}
    if unit.arm == "cached":
        engine, seconds = start_with_cache(model, config, unit.workdir / "cache")
        return {"ready_seconds": seconds, "logprobs": _logprobs(unit, engine)}
    if unit.arm == "portable":
        engine, seconds = start(model, config, unit.after["executable"] / FOLDER, portable=True)
        return {"ready_seconds": seconds, "logprobs": _logprobs(unit, engine)}
    shutil.rmtree(folder, ignore_errors=True)  # of a unit that was interrupted
    begin = time.perf_counter()
    save_programs(folder, jax.eval_shape(lambda: model), config)
    save_seconds = time.perf_counter() - begin
    engine, seconds = start(model, config, folder)
    logprobs = _logprobs(unit, engine)
    negated = jax.tree.map(jnp.negative, model)
    with compilations() as compiled:
        programs = load_programs(folder, negated, config)
    engine = Engine(negated, config, compiled=programs)
    with compilations() as more:
        engine.warm_up()
        other = _logprobs(unit, engine)
    assert other != logprobs
    sizes = {kind: sum(path.stat().st_size for path in folder.glob(f"*.{kind}")) for kind in LOADED}
    return {
        "ready_seconds": seconds,
        "save_seconds": save_seconds,
        "logprobs": logprobs,
        "compilations": len(compiled) + len(more),
        **{f"{kind}_bytes": size for kind, size in sizes.items()},
        "size_ratio": sizes["executable"] / sum(a.nbytes for a in jax.tree.leaves(model)),
        "not_refused": len(not_refused(folder, model, config, CHANGED)),
    }


def _logprobs(unit, engine):
    """The log-probabilities of all tokens that the unit's requests are given."""
    sizes = unit.config.requests
    prompts = [random_prompt(sizes.prompt, (unit.seed, i)) for i in range(sizes.count)]
    results = engine.run([greedy(prompt, sizes.new) for prompt in prompts])
    return [logprob for result in results for logprob in result.samples[0].logprobs]
