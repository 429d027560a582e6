"""PagedAttention: keys and values in pages, as in vLLM (Kwon 2023, arXiv:2309.06180).

A cache that reserves the longest length for each request is mostly empty: earlier systems use 20.4
to 38.2% of it for tokens (Figure 2). With pages of 16 tokens, given out one by one, vLLM uses
96.3%. So more requests fit, and it serves 2 to 4 times as many at equal latency (abstract). Equal
prompts share their pages (§4.4).

Here a decoder with random weights serves a trace with lognormal lengths. The contiguous cache has 2
rows of the longest length; the paged ones have as many slots in pages of 16 or 256 tokens, for up
to 8 rows. Slots that hold tokens are counted in the engine after each step. What preallocation,
powers of two and blocks would use is also simulated from the lengths alone. With sharing, one
prompt comes first, and 7 that share three quarters of it follow. Times are compared in one unit,
one after the other.

    ablate run efficiency/paged_attention --scale=smoke    # a few steps, no findings
    ablate run efficiency/paged_attention                  # cpu: 2 cores; time in `ablate list`
    ablate run efficiency/paged_attention --scale=gpu      # one accelerator
    ablate run efficiency/paged_attention --scale=paper    # 13B; 4 chips of TPU v5p
"""

import dataclasses

import numpy as np

from layers.config import check as require
from layers.state import CacheConfig
from research.ablation import Arm, Claim, Unit, difference, mean
from research.ablation.serving import (
    engine_config,
    greedy,
    greedy_requests,
    parted,
    random_decoder,
    random_prompt,
    serving_model,
    unit_trace,
    warm_engine,
)
from research.inference.engine import EngineConfig
from research.inference.observe import observe
from research.inference.trace import (
    blocks,
    powers_of_two,
    preallocated,
    simulate,
)

PAPER = (
    "Kwon 2023, Efficient Memory Management for Large Language Model Serving with PagedAttention, "
    "arXiv:2309.06180"
)
CODE = (
    "pallas_kernels/paged_attention/__init__.py",
    "research/inference/engine/pages.py",
    "research/inference/engine/prefixes.py",
    "research/inference/trace.py",
)
MATCHED = "weights, requests and bytes of the cache; paged arms have up to 4 times as many rows"
SEEDS = (0, 1, 2, 3, 4)
TOPOLOGY = "v5p:2x2x1"  # the slice of paper scale
PAGES = (16, 256)


def get_config(scale):
    config = serving_model(scale)
    smoke, small = scale == "smoke", scale in ("smoke", "cpu")
    length = 80 if smoke else 1280 if small else 2048
    engine = EngineConfig(slots=2 if small else 16, max_length=length, chunk=16 if smoke else 256)
    config.engine = dataclasses.asdict(engine)
    config.rows = (1 if smoke else 4) * engine.slots  # of paged arms
    config.tokens = engine.slots * length
    config.requests = 4 if smoke else 96
    config.prompt = dict(mean=2.0 if smoke else 4.2, spread=0.6, most=16 if smoke else 256)
    config.new = dict(mean=1.5 if smoke else 3.8, spread=0.8, most=8 if smoke else 256)
    config.shared = dict(requests=8, chunks=4, new=2 if smoke else 16)
    if scale == "paper":
        config.mesh = dict(data=1, tensor=4)
    return config


def _paged(page):
    return {
        "engine.slots": lambda config: config.rows,
        "engine.cache": lambda config: {
            **config.engine.cache,
            "kind": "paged",
            "page": min(page, config.engine.chunk),
            "pages": config.tokens // min(page, config.engine.chunk),
        },
    }


ARMS = (
    Arm("contiguous"),
    *(Arm(f"paged_{page}", _paged(page)) for page in PAGES),
    Arm("shared", {**_paged(16), "engine.prefix": True}),
)

GATE = Claim(
    "batching_pays",
    "A step of 8 rows takes less than 4 times one of 1 row",
    paper="",
    measure=mean("batch_cost", "contiguous"),
    comparison="<",
    margin=4.0,
)


def _same(arm, what):
    return Claim(
        f"same_{arm}",
        f"{what}, all greedy tokens are those of the contiguous cache, but for ties",
        paper="§4: pages change where keys are, not what is computed",
        measure=mean("untied", arm),
        comparison="<",
        margin=0.0,
        deterministic=True,
    )


CLAIMS = (
    Claim(
        "preallocated",
        "Less than 40% of the slots of contiguous rows hold tokens",
        paper="Figure 2: 20.4 to 38.2%",
        measure=mean("utilisation", "contiguous"),
        comparison="<",
        margin=0.4,
    ),
    Claim(
        "paged",
        "More than 90% of the slots of pages of 16 tokens do",
        paper="Figure 2: 96.3%",
        measure=mean("utilisation", "paged_16"),
        comparison=">",
        margin=0.9,
    ),
    Claim(
        "large_pages",
        "Of pages of 256 tokens, at least 10 points fewer hold tokens than of pages of 16",
        paper="§7.2: large blocks waste memory within them",
        measure=difference("utilisation", "paged_256", "paged_16"),
        comparison="<",
        margin=-0.1,
    ),
    _same("paged_16", "In pages of 16"),
    _same("paged_256", "In pages of 256"),
    _same("shared", "With shared prompts"),
    Claim(
        "sharing",
        "For 8 prompts that share three quarters, at most 0.4 of the prompt tokens are computed",
        paper="§6.4: no number for prompts of this length",
        measure=mean("prefilled", "shared"),
        comparison="<",
        margin=0.4,
        deterministic=True,
    ),
    Claim(
        "throughput",
        "With as many slots, pages of 16 serve the trace more than 1.5 times as fast",
        paper="abstract: 2 to 4 times the throughput of earlier systems",
        measure=mean("speedup", "paged_16"),
        comparison=">",
        margin=1.5,
        gate=GATE,
    ),
)


def check(unit: Unit):
    config, engine = unit.config, engine_config(unit)
    longest = max(work.prompt + work.new for work in unit_trace(unit))
    length = _shared_length(unit) + config.shared.new
    for least in (longest, length):
        fits = least <= engine.max_length
        require(fits, "engine.max_length", engine.max_length, f"must be at least {least}")


def run(unit: Unit):
    model = random_decoder(unit)
    if unit.arm == "shared":
        return _sharing(unit, model)
    trace, config = unit_trace(unit), engine_config(unit)
    requests = greedy_requests(trace, unit.seed)
    engine = warm_engine(model, config)
    found = observe(engine, requests, measure=lambda one: one.occupancy)
    held, allocated = np.sum([step.measured for step in found.steps], axis=0)
    metrics = {
        "utilisation": held / allocated,
        "steps": found.decoding_steps,
        "seconds": found.seconds,
        "preemptions": engine.stats.preemptions,
    }
    if unit.arm == "contiguous":
        return metrics | _simulated(unit, trace) | {"batch_cost": _batch_cost(unit, model)}
    whole = dataclasses.replace(config, slots=unit.config.tokens // config.max_length)
    whole = dataclasses.replace(whole, cache=CacheConfig(dtype=config.cache.dtype))
    other = observe(warm_engine(model, whole), requests)
    differ, untied = parted(found, other)
    return metrics | {
        "speedup": other.seconds / found.seconds,
        "differ": differ,
        "untied": untied,
    }


def _sharing(unit, model):
    """Prompts that share their first chunks but one: with and without sharing of prefixes."""
    shared, config = unit.config.shared, engine_config(unit)
    length, chunk = _shared_length(unit), config.chunk
    beginning = random_prompt(length - chunk, (unit.seed, 0))
    prompts = [beginning + random_prompt(chunk, (unit.seed, 1 + i)) for i in range(shared.requests)]
    requests = [greedy(prompt, shared.new) for prompt in prompts]
    at = [0] + [shared.chunks] * (shared.requests - 1)  # when the first prompt is computed
    engines = [
        warm_engine(model, each) for each in (config, dataclasses.replace(config, prefix=False))
    ]
    found = [observe(engine, requests, at=at) for engine in engines]
    differ, untied = parted(*found)
    with_prefix, without = (engine.stats.prefilled for engine in engines)
    return {
        "prefilled": with_prefix / without,
        "speedup": found[1].seconds / found[0].seconds,
        "differ": differ,
        "untied": untied,
    }


def _simulated(unit, trace):
    """The part of slots that hold tokens, from the lengths alone."""
    policies = {
        "preallocated": preallocated(unit.config.engine.max_length),
        "powers_of_two": powers_of_two,
        **{f"blocks_{page}": blocks(page) for page in PAGES},
    }
    rows = unit.config.rows
    return {
        f"simulated_{name}": simulate(trace, rows, policy).utilisation
        for name, policy in policies.items()
    }


def _batch_cost(unit, model):
    """The time of a step of all rows of the paged arms over that of one row."""
    prompts = [random_prompt(8, (unit.seed, i)) for i in range(unit.config.rows)]
    new = unit.config.new.most
    seconds = []
    for rows in (1, unit.config.rows):
        engine = warm_engine(model, engine_config(unit, slots=rows))
        some = [greedy(prompt, new) for prompt in prompts[:rows]]
        seconds.append(observe(engine, some).seconds_of_steps(rows))
    return seconds[1] / seconds[0]


def _shared_length(unit):
    return unit.config.shared.chunks * unit.config.engine.chunk
