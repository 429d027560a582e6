"""What serving experiments share: a decoder with random weights, and greedy requests of a trace.

Speeds, steps and slots do not depend on what a model has learnt.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from layers.attention import AttentionConfig
from layers.config import check_choice, from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.ablation.experiment import SCALES, Unit
from research.inference import SamplingConfig
from research.inference.engine import Engine, EngineConfig, Request
from research.inference.observe import Observation
from research.inference.trace import Lengths, Work, draw_trace

VOCABULARY = 256
TIE = 1e-4  # nats between two tokens of which either may be the likeliest, by rounding

# scale: width, layers, heads, mlp width
_SIZES = {
    "smoke": (32, 1, 4, 64),
    "cpu": (512, 4, 8, 1376),
    "gpu": (2048, 16, 16, 5632),
    "paper": (5120, 40, 40, 13_824),
}


def serving_model(scale: str) -> Any:
    """A `ConfigDict` with ``model``: a decoder of about 13 million parameters at ``cpu``.

    At ``paper`` it has the sizes of the 13B models of PagedAttention's and Orca's evaluations.
    """
    check_choice("scale", scale, SCALES)
    width, layers, heads, mlp = _SIZES[scale]
    model = DecoderConfig(
        vocab_size=VOCABULARY if scale in ("smoke", "cpu") else 32_000,
        width=width,
        num_layers=layers,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads),
        mlp=MlpConfig(width=mlp),
        dtype="float32" if scale in ("smoke", "cpu") else "bfloat16",
        scan=False,
    )
    config: Any = ConfigDict(dict(model=dataclasses.asdict(model)))
    return config


def random_decoder(unit: Unit) -> Decoder:
    """The unit's model with the random weights of its seed."""
    model = from_mapping(DecoderConfig, unit.config.model, "model")
    return jax.jit(lambda: Decoder(model, rngs=nnx.Rngs(unit.seed)))()


def random_prompt(length: int, seed: Sequence[int]) -> list[int]:
    """A prompt of ``length`` random tokens."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def greedy(prompt: Sequence[int], new: int) -> Request:
    """A request for exactly ``new`` greedy tokens."""
    return Request(prompt, SamplingConfig(max_new_tokens=new, temperature=0.0))


def greedy_requests(trace: Sequence[Work], seed: int) -> list[Request]:
    """A request for each of ``trace``, with random prompts."""
    return [greedy(random_prompt(work.prompt, (seed, i)), work.new) for i, work in enumerate(trace)]


def unit_trace(unit: Unit) -> list[Work]:
    """The requests of a unit: ``prompt`` and ``new`` of its configuration are their `Lengths`."""
    lengths = [from_mapping(Lengths, unit.config[name], name) for name in ("prompt", "new")]
    return draw_trace(unit.config.requests, *lengths, seed=unit.seed)


def engine_config(unit: Unit, **changes: Any) -> EngineConfig:
    """``engine`` of a unit's configuration with ``changes``."""
    return from_mapping(EngineConfig, {**unit.config.engine, **changes}, "engine")


def warm_engine(model: Decoder, config: EngineConfig, **options: Any) -> Engine:
    """An `Engine` whose programs are compiled."""
    engine = Engine(model, config, **options)
    engine.warm_up()
    return engine


def parted(one: Observation, other: Observation) -> tuple[int, int]:
    """How many samples of two greedy runs differ, and how many of them by more than a tie.

    A tie: at the first token that differs, the two tokens' log-probabilities are less than `TIE`
    apart. What follows another token is another text.
    """
    differ = untied = 0
    for sample, tokens in one.tokens.items():
        pairs = zip(tokens, other.tokens[sample], strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is not None:
            gap = abs(one.logprobs[sample][first] - other.logprobs[sample][first])
            differ, untied = differ + 1, untied + (gap >= TIE)
    return differ, untied
