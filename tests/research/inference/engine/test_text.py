"""The engine with a tokenizer: its text, stop strings and grammars."""

import dataclasses
import functools
import json
import re
from types import SimpleNamespace

import jax
import jsonschema
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig
from research.data import DataConfig, tokenizer_of, vocabulary_size
from research.inference import SamplingConfig
from research.inference.engine import Engine, EngineConfig, Request, Speculative
from research.inference.grammar import Grammar
from research.inference.prompt import _from_data

DATA = DataConfig()
BYTES = tokenizer_of(DATA)
SAMPLED = SamplingConfig(max_new_tokens=200, temperature=1.0, stop_tokens=(BYTES.eos,))


@functools.cache
def make(**options):
    config = DecoderConfig(
        vocabulary_size(DATA), 16, 1, attention=AttentionConfig(2), mlp=MlpConfig(24)
    )
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    cache = CacheConfig("paged", page=8)
    sizes = EngineConfig(slots=4, max_length=256, chunk=16, cache=cache)
    engine = Engine(model, sizes, tokenizer=_from_data(DATA, None, False), **options)
    engine.warm_up()
    return engine


def request(seed=0, **fields):
    sampling = dataclasses.replace(SAMPLED, seed=seed)
    return Request(BYTES.encode("a b"), **{"sampling": sampling, **fields})


def test_text_is_that_of_the_tokens():
    engine = make()
    for result in engine.run([request(seed) for seed in range(6)]):
        tokens = [token for token in result.tokens if token != BYTES.eos]
        assert result.text == BYTES.decode(tokens)


def test_a_stop_string_ends_the_text_before_it():
    engine = make()
    free = engine.run([request(seed, n=2) for seed in range(4)])
    for seed, result in enumerate(free):
        for sample in result.samples:
            stops = [sample.text[i : i + 3] for i in (2, 9)]
            first = min(sample.text.index(stop) for stop in stops)
            [stopped] = engine.run([request(seed, n=2, stop=tuple(stops))])
            other = stopped.samples[result.samples.index(sample)]
            assert other.text == sample.text[:first] and other.finish_reason == "stop"
            assert other.tokens == sample.tokens[: len(other.tokens)]


def test_text_has_the_form_of_its_grammar():
    engine = make()
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    requests = [request(seed, grammar=Grammar.json_schema(schema)) for seed in range(4)]
    requests += [request(seed, grammar=Grammar.regex("[a-c]{2,5}!")) for seed in range(4)]
    requests += [request(seed) for seed in range(4)]
    results = engine.run(requests)
    for result in results[:4]:
        jsonschema.validate(json.loads(result.text), schema)
    for result in results[4:8]:
        assert re.fullmatch("[a-c]{2,5}!", result.text)
    assert {result.finish_reason for result in results[:8]} == {"stop"}
    free = [engine.run([request(seed)])[0].tokens for seed in range(4)]
    assert [result.tokens for result in results[8:]] == free  # beside others with grammars
    assert engine.run([requests[5]])[0].tokens == results[5].tokens


def test_a_grammar_that_exceeds_its_limits_ends_its_row_only():
    hard, bias = Grammar.regex("(a|b|ab|ba|[^c]{3,500}){1,500}"), ((ord("a"), 10), (ord("b"), 10))
    biased = dataclasses.replace(SAMPLED, logit_bias=bias)
    engine, free = make(), request(1)
    failed, other = engine.run([request(grammar=hard, sampling=biased), free])
    assert failed.finish_reason == "error" and 1 < len(failed.tokens) < 200
    assert other.tokens == engine.run([free])[0].tokens


def test_an_end_for_want_of_a_mask_is_an_error(monkeypatch):
    """After drafts that a step did not keep met a limit, only an end may follow."""
    mask = np.arange(vocabulary_size(DATA)) == BYTES.eos
    lost = SimpleNamespace(mask=lambda: mask, accept=lambda _: False, error="limit", is_done=False)
    engine = make()
    monkeypatch.setattr(engine, "_matcher", lambda _: lost)
    [result] = engine.run([request()])
    assert result.tokens == [BYTES.eos] and result.finish_reason == "error"


def test_a_grammar_that_cannot_be_compiled_is_refused():
    engine = make()
    with pytest.raises(ConfigError, match="^regex='\\('"):
        engine.add(request(grammar=Grammar.regex("(")))
    assert not engine.has_work


def test_drafts_are_held_to_a_grammar():
    """The same texts as without drafts; the grammar repeats itself, so that drafts are accepted."""
    plain, engine = make(), make(speculative=Speculative(ngram=(1, 4), tokens=3))
    grammar = Grammar.regex(r"(ab[cd]){5,7}\.")
    requests = [request(seed, grammar=grammar, n=2) for seed in range(3)]
    results, want = engine.run(requests), plain.run(requests)
    for ours, theirs in zip(results, want, strict=True):
        for sample, other in zip(ours.samples, theirs.samples, strict=True):
            assert sample.tokens == other.tokens and sample.text == other.text
            assert re.fullmatch(grammar.text, sample.text) and sample.finish_reason == "stop"
    assert 0 < engine.stats.accepted < engine.stats.proposed
