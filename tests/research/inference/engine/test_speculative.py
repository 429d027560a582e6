"""Speculation in the engine: the tokens and the law of the model alone, whatever drafts."""

import dataclasses
import functools

import jax
import jax.monitoring
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig
from research.inference import SamplingConfig, generate
from research.inference.engine import Engine, EngineConfig, Request, Speculative
from research.inference.grammar import Grammar
from tests.research.inference.engine.test_engine import (
    BASE,
    CONFIGS,
    GREEDY,
    PROMPTS,
    SAMPLED,
    WINDOW,
    V,
    answers,
    full,
    greedy,
    whole,
)

TOKENS = 3
# Four slots of four tokens, a multiple of 8: Mamba's steps have rank 1 here, and in a product with
# one column XLA rounds the rows after the last multiple of 8 in another way on a CPU.
CONTIGUOUS = EngineConfig(slots=4, max_length=32, chunk=4)
PAGED = dataclasses.replace(CONTIGUOUS, cache=CacheConfig("paged", page=2))
STACKS = {
    **CONFIGS,
    "windows": CONFIGS["latent"] | dict(pattern=("sliding", "latent"), attention=WINDOW),
}
PREFIX = dataclasses.replace(PAGED, prefix=True)
# a stack, its engine, and what drafts: "itself", "ngram", or the stack of another small model
DEFAULT = [
    ("attention", CONTIGUOUS, "itself"),
    ("windows", PAGED, "ngram"),
    ("hybrid", PREFIX, "mamba"),
]
ALL = [
    (name, config, drafter)
    for name in CONFIGS
    for config in (CONTIGUOUS, PAGED)
    for drafter in ("itself", "ngram", "attention", "sliding", "rwkv")
    if config is CONTIGUOUS or not name.startswith(("mamba", "rwkv"))
]
CASES = [
    *DEFAULT,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in DEFAULT),
]


@functools.cache
def make(name, seed=0):
    """A model of ``STACKS``; of another seed, one layer or pattern of it."""
    config = dataclasses.replace(BASE, **STACKS[name])
    if seed:
        config = dataclasses.replace(config, num_layers=len(config.pattern))
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(seed)))()
    return jax.tree.map(lambda a: a * 2 if a.ndim > 2 else a, model)


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    stop_tokens = ()

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


@functools.cache
def engine_of(name, config, drafter):
    if drafter == "ngram":
        speculative = Speculative(ngram=(1, 3), tokens=TOKENS)
    else:
        draft = make(name) if drafter == "itself" else make(drafter, seed=1)
        speculative = Speculative(draft=draft, tokens=TOKENS)
    engine = Engine(make(name), config, tokenizer=Letters(), speculative=speculative)
    engine.warm_up()
    return engine


@functools.cache
def expected(name):
    """The greedy tokens of each prompt and their log-probabilities, by full forwards."""
    return [greedy(make(name), prompt) for prompt in PROMPTS]


def requests_of(sampling, **fields):
    return [
        Request(prompt, dataclasses.replace(sampling, seed=seed), **fields)
        for seed, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(("name", "config", "drafter"), CASES)
def test_greedy_tokens_are_those_of_the_model_alone(name, config, drafter):
    engine = engine_of(name, config, drafter)
    before = dataclasses.replace(engine.stats)
    before.proposed_at, before.accepted_at = before.proposed_at[:], before.accepted_at[:]
    results = engine.run(requests_of(GREEDY))
    for result, (tokens, logprobs) in zip(results, expected(name), strict=True):
        assert result.tokens == tokens and result.finish_reason == "length"
        np.testing.assert_allclose(result.samples[0].logprobs, logprobs, atol=2e-4)
    stats = engine.stats
    accepted, proposed = stats.accepted - before.accepted, stats.proposed - before.proposed
    passes, generated = stats.passes - before.passes, stats.generated - before.generated
    assert generated == len(PROMPTS) * GREEDY.max_new_tokens == passes + accepted
    if drafter == "itself":
        # three passes of three drafts and one more token give twelve
        assert proposed == accepted == 9 * len(PROMPTS) and passes == 3 * len(PROMPTS)
    else:
        assert 0 < accepted < proposed
    at = np.subtract(stats.accepted_at, before.accepted_at)
    assert (np.diff(at) <= 0).all()  # a draft is accepted after the one before it
    assert whole(engine)


@pytest.mark.parametrize(("name", "config", "drafter"), CASES)
def test_a_request_has_bit_for_bit_the_tokens_that_it_has_alone(name, config, drafter):
    engine = engine_of(name, config, drafter)
    requests = requests_of(SAMPLED, n=2)
    alone = answers([engine.run([request])[0] for request in requests])
    assert len({tuple(tokens) for samples in alone for tokens, _ in samples}) > len(PROMPTS)
    assert answers(engine.run(requests)) == alone
    assert answers(engine.run(requests[::-1])) == alone[::-1]
    for request in requests[:2]:  # late, and beside other settings
        engine.add(Request([1, 2, 3], GREEDY))
        engine.step()
        assert answers(engine.run([request])) == [alone[requests.index(request)]]
        for _ in engine.stream():
            pass
    assert config is not PREFIX or engine.stats.shared > 0
    assert whole(engine)


@pytest.mark.parametrize(("name", "config", "drafter"), CASES)
def test_a_request_that_lost_its_memory_has_the_same_tokens(name, config, drafter):
    """Its steps are computed again with the same number of tokens."""
    engine = engine_of(name, config, drafter)
    requests = requests_of(SAMPLED)
    want = answers(engine.run(requests))
    replayed = engine.stats.replayed
    pages = engine._allocator.pages
    if pages is None:
        ids = [engine.add(request) for request in requests]
        results = [engine._results[i] for i in ids]
        seen = set()
        while engine.has_work:
            engine.step()
            begun = [s for s in engine._running if s.decoded and s.request_id not in seen]
            for sequence in begun[:1]:
                seen.add(sequence.request_id)
                engine._preempt(sequence)
    else:
        if engine._allocator.prefixes is not None:
            engine._allocator.prefixes.clear()
        held = pages.allocate(pages.free - 12)  # so that two sequences do not have room
        assert held is not None
        results = engine.run(requests)
        if engine._allocator.prefixes is not None:
            engine._allocator.prefixes.clear()
        pages.release(held)
    assert answers(results) == want
    assert engine.stats.replayed > replayed
    assert whole(engine)


@pytest.mark.parametrize(("name", "config", "drafter"), DEFAULT)
def test_what_was_left_in_memory_never_reaches_its_next_owner(name, config, drafter):
    engine = engine_of(name, config, drafter)
    requests = requests_of(SAMPLED)
    want = answers(engine.run(requests))
    assert whole(engine)  # no prefix is kept

    def poisoned(a):
        return a * np.nan if np.issubdtype(a.dtype, np.floating) else a

    states = jax.tree.map(poisoned, engine._runner._memory.states)
    engine._runner._memory = dataclasses.replace(engine._runner._memory, states=states)
    assert answers(engine.run(requests)) == want
    assert whole(engine)


@pytest.mark.parametrize("sampling", [SAMPLED, dataclasses.replace(SAMPLED, temperature=0)])
def test_tokens_drafted_by_ngrams_are_those_of_generate(sampling):
    """Also sampled ones, with penalties that count accepted drafts one after the other."""
    engine, prompt = engine_of(*DEFAULT[1]), [1, 2, 1, 2, 1, 2, 1]
    result = engine.run([Request(prompt, sampling, n=3)])[0]
    want = generate(make("windows"), [prompt] * 3, sampling)
    assert [sample.tokens for sample in result.samples] == want


def test_penalties_of_a_draft_model_count_the_drafts_before():
    """A model that drafts for itself knows what it would choose."""
    engine, sampling = engine_of(*DEFAULT[0]), dataclasses.replace(SAMPLED, temperature=0)
    before = engine.stats.proposed, engine.stats.accepted
    result = engine.run([Request(PROMPTS[1], sampling)])[0]
    assert [result.tokens] == generate(make("attention"), [PROMPTS[1]], sampling)
    assert result.tokens != expected("attention")[1][0]
    assert engine.stats.proposed - before[0] == engine.stats.accepted - before[1] == 9


def test_sampled_tokens_have_the_models_law():
    """Three tokens of a vocabulary of three: all 27 outcomes are enumerated."""
    config = DecoderConfig(
        3, 8, 1, attention=AttentionConfig(2), mlp=MlpConfig(8), init_std=1.0, tie_embeddings=False
    )
    model, draft = (Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 5))
    sizes = EngineConfig(slots=16, max_length=8, chunk=4)
    engine = Engine(model, sizes, speculative=Speculative(draft=draft, tokens=2))
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.7, presence_penalty=0.4)
    prompt, count = [0, 2], 2_500
    law = np.zeros((3, 3, 3))
    for tokens in np.ndindex(law.shape):
        logprob = 0.0
        for i, token in enumerate(tokens):
            scores = full(model, [*prompt, *tokens[:i]])[-1].astype(float)
            scores[list(set(tokens[:i]))] -= 0.4
            scores /= 0.7
            logprob += scores[token] - np.logaddexp.reduce(scores)
        law[tokens] = np.exp(logprob)
    found = np.zeros(law.shape)
    requests = [
        Request(prompt, dataclasses.replace(sampling, seed=seed), n=10)
        for seed in range(count // 10)
    ]
    for result in engine.run(requests):
        for sample in result.samples:
            found[tuple(sample.tokens)] += 1
    assert 0.3 < engine.stats.accepted / engine.stats.proposed < 0.95  # both cases occur
    assert np.abs(found / count - law).sum() / 2 < 0.06
    assert scipy.stats.chisquare(found.ravel(), law.ravel() * count).pvalue > 1e-3


@pytest.mark.parametrize(("name", "config", "drafter"), DEFAULT)
def test_the_numbers_of_tokens_are_exact(name, config, drafter):
    engine = engine_of(name, config, drafter)
    tokens, _ = expected(name)[1]
    new = [0, 1, 2, 3, 4, 5, 9, 12]
    results = engine.run(
        [Request(PROMPTS[1], dataclasses.replace(GREEDY, max_new_tokens=count)) for count in new]
    )
    assert [result.tokens for result in results] == [tokens[:count] for count in new]
    assert {result.finish_reason for result in results} == {"length"}
    # up to the last position
    prompt = (PROMPTS[1] * 3)[: config.max_length - 12]
    assert len(engine.run([Request(prompt, GREEDY)])[0].tokens) == 12
    assert whole(engine)


def test_a_stop_within_accepted_drafts_ends_there():
    engine, (tokens, _) = engine_of(*DEFAULT[0]), expected("attention")[1]
    text = Letters().decode(tokens)
    for i in range(len(tokens)):
        first = tokens.index(tokens[i])
        sampling = dataclasses.replace(GREEDY, stop_tokens=(tokens[i],))
        result = engine.run([Request(PROMPTS[1], sampling)])[0]
        assert result.tokens == tokens[: first + 1] and result.finish_reason == "stop"
        stop = text[i : i + 2]
        result = engine.run([Request(PROMPTS[1], GREEDY, stop=(stop,))])[0]
        end = text.index(stop)
        assert result.text == text[:end] and result.tokens == tokens[: end + len(stop)]
        assert result.finish_reason == "stop"
    assert whole(engine)


class Alternating:
    """A matcher of texts whose tokens are even and odd in turn, up to ``most``."""

    error = None

    def __init__(self, most):
        self.count, self.most = 0, most

    def mask(self):
        assert not self.is_done
        return np.arange(V) % 2 == self.count % 2

    def masks(self, drafts):
        allowed = np.ones((len(drafts) + 1, V), bool)
        count, accepted = self.count, 0
        for i in range(len(allowed)):
            if self.is_done:
                break
            allowed[i] = self.mask()
            if i == len(drafts) or not allowed[i, drafts[i]]:
                break
            self.count += 1
            accepted += 1
        self.count = count
        return allowed

    def accept(self, token):
        assert self.mask()[token]
        self.count += 1
        return True

    @property
    def is_done(self):
        return self.count == self.most


def test_samples_that_wait_have_no_index_of_their_prompt():
    engine = engine_of("attention", PAGED, "ngram")
    request = engine.add(Request([1, 2, 3] * 5, GREEDY, n=16))
    assert all(sequence.ngrams is None for sequence in engine._waiting)
    engine.cancel(request)
    engine.step()
    assert whole(engine)


@pytest.mark.parametrize(("name", "config", "drafter"), DEFAULT)
def test_grammars_hold_for_drafts_too(name, config, drafter, monkeypatch):
    engine, model = engine_of(name, config, drafter), make(name)
    matchers = []

    def compile_grammar(*_):
        matchers.append(Alternating(7))
        return matchers[-1]

    monkeypatch.setattr("research.inference.engine.engine.compile_grammar", compile_grammar)
    requests = [Request(prompt, GREEDY, grammar=Grammar.regex("a")) for prompt in PROMPTS]
    free = Request(PROMPTS[1], GREEDY)
    results = engine.run([*requests, free])
    for prompt, result in zip(PROMPTS, results, strict=False):
        tokens = list(prompt)
        for i in range(7):
            last = full(model, tokens)[-1]
            tokens.append(int(np.where(np.arange(V) % 2 == i % 2, last, -np.inf).argmax()))
        assert result.tokens == tokens[len(prompt) :] and result.finish_reason == "stop"
    assert results[-1].tokens == expected(name)[1][0]
    sampled = engine.run([dataclasses.replace(r, sampling=SAMPLED) for r in requests])
    assert all(t % 2 == i % 2 for r in sampled for i, t in enumerate(r.tokens))
    assert whole(engine)


def test_nothing_is_compiled_after_warming_up():
    name, config, drafter = DEFAULT[2]
    speculative = Speculative(draft=make(drafter, seed=1), tokens=TOKENS)
    engine = Engine(make(name), config, speculative=speculative)
    engine.warm_up()
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        requests = requests_of(GREEDY, n=2, echo=True)
        requests += requests_of(dataclasses.replace(SAMPLED, logprobs=3))
        results = engine.run(requests)
        assert compiled == []
    finally:
        jax.monitoring.clear_event_listeners()
    # a token's log-probability is that of the top ones, when it is among these
    for result in results[len(PROMPTS) :]:
        sample = result.samples[0]
        assert all(len(top) == 3 for top in sample.top)
        pairs = zip(sample.tokens, sample.logprobs, sample.top, strict=True)
        assert any(token in dict(top) for token, _, top in pairs)
        for token, logprob, top in zip(sample.tokens, sample.logprobs, sample.top, strict=True):
            assert dict(top).get(token, logprob) == logprob


OTHER = Decoder(dataclasses.replace(BASE, vocab_size=V + 1, num_layers=1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(), "speculative=[]: requires exactly one of draft and ngram"),
        (dict(draft=OTHER, ngram=(1, 2)), "speculative=['draft', 'ngram']: requires exactly one"),
        (dict(draft=OTHER), "speculative.draft.vocab_size=18: must be the model's vocab_size=17"),
        (dict(draft="small"), "draft='small': must be of type"),
        (dict(ngram=(2, 1)), "ngram=(2, 1): must be 1 ≤ least ≤ most"),
        (dict(ngram=(0, 1)), "ngram=(0, 1): must be 1 ≤ least ≤ most"),
        (dict(ngram=(1, 2), tokens=0), "speculative.tokens=0: must be > 0"),
        (dict(ngram=(1, 2), tokens=32), "speculative.tokens=32: must be below max_length=32"),
    ],
)
def test_what_cannot_draft_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError) as error:
        Engine(make("attention"), CONTIGUOUS, speculative=Speculative(**fields))
    assert str(error.value).startswith(message)
