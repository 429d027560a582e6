"""Ties between greedy runs, and what an engine observed step by step must add up to."""

import dataclasses

import jax
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.ablation.serving import TIE, greedy_requests, parted
from research.inference.engine import Engine, EngineConfig
from research.inference.observe import Observation, observe
from research.inference.trace import Lengths, Work, draw_trace, preallocated, simulate

ATTENTION = AttentionConfig(num_heads=2, head_dim=4, implementation="reference")
CONFIG = DecoderConfig(256, 8, 1, attention=ATTENTION, mlp=MlpConfig(8), scan=False)
SLOTS, LENGTH = 3, 32


def run(tokens, logprobs):
    return Observation([], {(0, 0): tokens, (1, 0): [7]}, {(0, 0): logprobs, (1, 0): [-1.0]})


def test_samples_part_by_a_tie_or_by_more():
    one = run([1, 2, 3], [-1.0, -2.0, -3.0])
    assert parted(one, run([1, 2, 3], [-1.1, -2.1, -3.1])) == (0, 0)
    assert parted(one, run([1, 4, 5], [-1.0, -2.0 + 0.5 * TIE, -9.0])) == (1, 0)
    assert parted(one, run([1, 4, 3], [-1.0, -2.0 + 2 * TIE, -3.0])) == (1, 1)


@pytest.fixture(scope="module")
def engine():
    model = jax.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))()
    return Engine(model, EngineConfig(slots=SLOTS, max_length=LENGTH, chunk=16))


def test_an_observed_engine_takes_the_simulated_steps_and_slots(engine):
    lengths = Lengths(2.0, 0.5, most=16)
    trace = draw_trace(9, lengths, lengths, seed=0)
    found = observe(engine, greedy_requests(trace, 0), measure=lambda one: one.occupancy)
    assert {s: len(tokens) for s, tokens in found.tokens.items()} == {
        (i, 0): work.new for i, work in enumerate(trace)
    }
    simulated = simulate(trace, SLOTS, preallocated(LENGTH))
    assert found.passes() == simulated.rows
    # one prompt is computed in a step, so slots may wait for one another
    assert simulated.steps <= found.decoding_steps <= simulated.steps + len(trace)


def test_occupancy_is_what_the_running_samples_hold(engine):
    """After step i of a request alone: its prompt and i − 1 tokens, the last of which is new."""
    found = observe(engine, greedy_requests([Work(20, 4)], 0), measure=lambda one: one.occupancy)
    # 19 tokens of the prompt in 2 chunks; the second step decodes the first token from the 20th
    assert [step.measured for step in found.steps] == [
        (16, LENGTH), (20, LENGTH), (21, LENGTH), (22, LENGTH), (0, 0)
    ]  # fmt: skip


def test_requests_are_those_of_their_trace_and_seed():
    trace = [Work(3, 5), Work(4, 6)]
    one, other = greedy_requests(trace, 0), greedy_requests(trace, 1)
    assert [(len(r.tokens), r.sampling.max_new_tokens) for r in one] == trace
    assert one[0].tokens != other[0].tokens and one == greedy_requests(trace, 0)
    assert all(r.sampling == dataclasses.replace(r.sampling, temperature=0.0) for r in one)
