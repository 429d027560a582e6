"""Continuous batching: Orca (Yu 2022, OSDI), and chunked prefill: Sarathi-Serve (Agrawal 2024).

Requests of a static batch end at different steps and wait for the longest. Orca schedules by step:
a request that ends makes room for the next one at once (§3.2), and serves GPT-3 175B at 36.9 times
the throughput of FasterTransformer at equal latency. When a long prompt enters, it delays the next
token of all others. Sarathi-Serve (arXiv:2403.02310) computes prompts in chunks between the steps
of the others, and serves 2.6 times as many requests of Mistral-7B within the same latency.

Here a decoder with random weights serves a trace with lognormal lengths in 8 slots. The static arm
is `research.inference.generate` in groups of 8, one compiled loop for each group; programs are
compiled before they are timed. Times are compared in one unit, one after the other. A request's
tokens are compared with those that it has alone in the same engine. For chunks, 7 requests decode
while a prompt of 1,024 tokens enters, in chunks or as a whole; and 8 prompts of 1,024 tokens are
served. The order of work of one device is compared: there is no second one to overlap with. Both
kinds of batches run all 8 rows in each step, also those that wait, so the cost of a step of 8 rows
beside one of 1 row (``batch_cost``) decides nothing here.

    ablate run efficiency/continuous_batching --scale=smoke    # a few steps, no findings
    ablate run efficiency/continuous_batching                  # cpu: 2 cores; time in `ablate list`
    ablate run efficiency/continuous_batching --scale=gpu      # one accelerator
    ablate run efficiency/continuous_batching --scale=paper    # 13B; 4 chips of TPU v5p
"""

import dataclasses
import functools
import time

import jax
import numpy as np
from flax import nnx

from layers.config import check as require
from layers.config import from_mapping
from layers.decoder import Decoder
from layers.outputs_first import for_decoding
from research.ablation import Arm, Claim, Unit, mean
from research.ablation.serving import (
    engine_config,
    greedy,
    greedy_requests,
    random_decoder,
    random_prompt,
    serving_model,
    unit_trace,
    warm_engine,
)
from research.inference import SamplingConfig, generate
from research.inference.engine import EngineConfig
from research.inference.observe import observe
from research.inference.trace import simulate

PAPER = (
    "Yu 2022, Orca: A Distributed Serving System for Transformer-Based Generative Models, OSDI; "
    "Agrawal 2024, Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve, "
    "arXiv:2403.02310"
)
CODE = ("research/inference/engine/engine.py", "research/inference/trace.py")
MATCHED = "weights, requests and slots; for chunks also the engine"
SEEDS = (0, 1, 2, 3, 4)
TOPOLOGY = "v5p:2x2x1"  # the slice of paper scale
PAPER_ARMS = ("continuous",)  # the others differ in their schedules only


def get_config(scale):
    config = serving_model(scale)
    if scale == "smoke":
        config.engine = dict(slots=2, max_length=32, chunk=16)
        config.requests, config.alone = 3, 1
        config.prompt = dict(mean=2.5, spread=0.1, least=9, most=16)
        config.new = dict(mean=1.0, spread=0.0, most=8, multiple=8)
        config.long = dict(prompt=32, new=16, repeats=1)
    else:
        config.engine = dict(slots=8, max_length=320, chunk=64)
        config.requests, config.alone = 96, 8
        # `generate` pads prompts to one width, and compiles for each length of a group
        config.prompt = dict(mean=3.8, spread=0.3, least=33, most=64)
        config.new = dict(mean=3.8, spread=0.8, most=256, multiple=16)
        config.long = dict(prompt=1024, new=128, repeats=3)
    config.engine = dataclasses.asdict(from_mapping(EngineConfig, config.engine, "engine"))
    if scale == "paper":
        config.mesh = dict(data=1, tensor=4)
    return config


def _chunk(size):
    return {"engine.chunk": lambda config: min(size, config.long.prompt)}


ARMS = (
    Arm("continuous"),
    *(Arm(f"chunk_{size}", _chunk(size)) for size in (64, 256)),
)


def _gap(size):
    return Claim(
        f"gap_chunk_{size}",
        f"While a prompt of 1,024 tokens enters in chunks of {size}, the longest time between two "
        "tokens of another request is less than half of that without chunks",
        paper="Sarathi-Serve, Figure 1: generation stalls of seconds without chunks",
        measure=mean("gap_ratio", f"chunk_{size}"),
        comparison="<",
        margin=0.5,
    )


def _throughput(size):
    return Claim(
        f"throughput_chunk_{size}",
        f"Prompts of 1,024 tokens in chunks of {size} keep more than 0.85 of the throughput",
        paper="Sarathi-Serve, §5.4: chunks cost little where they fill the device",
        measure=mean("throughput_ratio", f"chunk_{size}"),
        comparison=">",
        margin=0.85,
    )


CLAIMS = (
    Claim(
        "steps",
        "Static batches take more than 1.8 times the steps of continuous ones",
        paper="Orca, §3.1: no number of steps",
        measure=mean("steps_ratio", "continuous"),
        comparison=">",
        margin=1.8,
    ),
    Claim(
        "as_simulated",
        "The engine takes less than 5% more steps than lengths alone require",
        paper="none: a check of this engine",
        measure=mean("steps_over_simulated", "continuous"),
        comparison="<",
        margin=1.05,
    ),
    Claim(
        "speedup",
        "Continuous batches serve the trace more than 1.4 times as fast as static ones",
        paper="Orca, abstract: 36.9 times the throughput at equal latency",
        measure=mean("speedup", "continuous"),
        comparison=">",
        margin=1.4,
    ),
    Claim(
        "alone",
        "Each request has the tokens and log-probabilities, bit for bit, that it has alone",
        paper="Orca, §3.2: what is computed does not change",
        measure=mean("changed", "continuous"),
        comparison="<",
        margin=0.0,
        deterministic=True,
    ),
    *map(_gap, (64, 256)),
    *map(_throughput, (64, 256)),
)


def check(unit: Unit):
    config, engine = unit.config, engine_config(unit)
    longest = max((work.prompt + work.new for work in unit_trace(unit)), default=0)
    fits = longest <= engine.max_length
    require(fits, "engine.max_length", engine.max_length, f"must be at least {longest}")
    count = min(config.alone, config.requests)
    require(count == config.alone, "alone", config.alone, f"must be at most {config.requests}")


def run(unit: Unit):
    model = random_decoder(unit)
    model = for_decoding(model)  # not in each call of `generate`
    return _batching(unit, model) if unit.arm == "continuous" else _chunks(unit, model)


def _batching(unit, model):
    trace, slots = unit_trace(unit), unit.config.engine.slots
    requests = greedy_requests(trace, unit.seed)
    engine = warm_engine(model, engine_config(unit))
    found = observe(engine, requests)
    groups = [requests[i : i + slots] for i in range(0, len(requests), slots)]
    for group in groups:
        _compile_static(model.config, len(group), _longest(group))
    started = time.perf_counter()
    for done, group in enumerate(groups):
        _static(model, [request.tokens for request in group], _longest(group))
        unit.progress(done + 1, len(groups), {})
    static_seconds = time.perf_counter() - started
    alone = [observe(engine, [request]) for request in requests[: unit.config.alone]]
    changed = sum(
        (one.tokens[0, 0], one.logprobs[0, 0]) != (found.tokens[i, 0], found.logprobs[i, 0])
        for i, one in enumerate(alone)
    )
    of_one = observe(warm_engine(model, engine_config(unit, slots=1)), requests[:1])
    steps = found.decoding_steps
    return {
        "steps": steps,
        "steps_ratio": simulate(trace, slots, static=True).steps / steps,
        "steps_over_simulated": steps / simulate(trace, slots).steps,
        "seconds": found.seconds,
        "static_seconds": static_seconds,
        "speedup": static_seconds / found.seconds,
        "changed": changed,
        "batch_cost": found.seconds_of_steps(slots) / of_one.seconds_of_steps(1),
    }


def _chunks(unit, model):
    """The engine with chunks and with whole prompts, in turn."""
    long, slots = unit.config.long, unit.config.engine.slots
    length = long.prompt + long.new
    sizes = (unit.config.engine.chunk, long.prompt)
    by_size = {
        chunk: warm_engine(model, engine_config(unit, max_length=length, chunk=chunk))
        for chunk in set(sizes)
    }
    engines = [by_size[chunk] for chunk in sizes]
    prompts = [random_prompt(long.prompt, (unit.seed, i)) for i in range(slots)]
    running = [greedy(prompt[: long.prompt // 32], long.new) for prompt in prompts[1:]]
    entering = [*running, greedy(prompts[0], 1)]
    at = [*[0] * len(running), 2 * slots]  # all others decode by then
    gaps, seconds = [], []
    for repeat in range(long.repeats):
        found = [observe(engine, entering, at=at) for engine in engines]
        samples = [(i, 0) for i in range(len(running))]
        gaps.append([one.longest_gap(samples, (len(running), 0), 2 * slots) for one in found])
        served = [observe(engine, [greedy(p, long.new) for p in prompts]) for engine in engines]
        seconds.append([one.seconds for one in served])
        unit.progress(repeat + 1, long.repeats, {})
    (gap, whole_gap), (time_, whole_time) = np.median(gaps, axis=0), np.median(seconds, axis=0)
    return {
        "gap_seconds": gap,
        "gap_ratio": gap / whole_gap,
        "throughput_ratio": whole_time / time_,
    }


def _static(model, prompts, new):
    return generate(model, prompts, SamplingConfig(max_new_tokens=new, temperature=0.0))


@functools.cache
def _compile_static(model, rows, new):
    """Run `_static` once in this process for these shapes; it is compiled by then."""
    decoder = for_decoding(jax.jit(lambda: Decoder(model, rngs=nnx.Rngs(0)))())
    _static(decoder, [random_prompt(64, (i,)) for i in range(rows)], new)


def _longest(group):
    return max(request.sampling.max_new_tokens for request in group)
