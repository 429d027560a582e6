"""The engine against full forwards, and against itself with other requests around."""

import dataclasses
import functools

import jax
import jax.monitoring
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.cache import KVCache
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.latent_attention import LatentConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from layers.rwkv import RwkvConfig
from layers.state import CacheConfig
from research.inference import SamplingConfig
from research.inference.engine import Engine, EngineConfig, QueueFull, Request

V = 17
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2)
WINDOW = dataclasses.replace(ATTENTION, window=5)
BASE = DecoderConfig(
    V, 16, 2, attention=ATTENTION, mlp=MlpConfig(24), init_std=1.0, tie_embeddings=False
)
RWKV = RwkvConfig(head_dim=8, decay_rank=3, rate_rank=3, value_rank=3, gate_rank=3)
MAMBA = MambaConfig(state=3, convolution=3, head_dim=8)
LATENT = LatentConfig(4, rank=6, head_dim=4, rotary_dim=2, value_dim=3)
CONFIGS = {
    "attention": dict(),
    "sliding": dict(pattern=("sliding", "attention"), attention=WINDOW),
    "latent": dict(pattern=("latent",), latent=LATENT),
    "learned": dict(position="learned", max_length=32),
    "experts": dict(feed_forward=("moe",), moe=MoeConfig(4, 24)),
    "mamba": dict(pattern=("mamba", "mamba2"), mamba=MAMBA, position="none"),
    "rwkv": dict(
        pattern=("rwkv7",), feed_forward=("rwkv7",), rwkv=RWKV, norm="layernorm", position="none"
    ),
    "rwkv4": dict(
        pattern=("rwkv4",),
        feed_forward=("rwkv4",),
        rwkv=RwkvConfig(channels=12),
        norm="layernorm",
        position="none",
    ),
    "hybrid": dict(pattern=("attention", "mamba"), mamba=MAMBA),
}
CONTIGUOUS = EngineConfig(slots=3, max_length=32, chunk=4)
PAGED = dataclasses.replace(CONTIGUOUS, cache=CacheConfig("paged", page=2))
PROMPTS = [
    [3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [16, 0, 16, 0], [5, 6], [9] * 9, [1, 2, 3, 4, 5],
    [7, 7, 7, 2, 1, 0, 4, 4, 13],
]  # fmt: skip
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
SAMPLED = SamplingConfig(
    max_new_tokens=12, temperature=1.3, top_p=0.95, frequency_penalty=0.5, repetition_penalty=1.2
)


@functools.cache
def make(name):
    config = dataclasses.replace(BASE, **CONFIGS[name])
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    # sharper than at the start, so that the context matters to the choice
    return jax.tree.map(lambda a: a * 2 if a.ndim > 2 else a, model)


@functools.cache
def engine_of(name, config):
    engine = Engine(make(name), config)
    engine.warm_up()
    return engine


@jax.jit
def forward(model, tokens):
    return jax.nn.log_softmax(model(tokens).logits_btv)


def full(model, tokens):
    """Log-probabilities ``[t, v]`` by one full forward; padded, which causality hides."""
    row = np.zeros((1, 32), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(forward(model, row)[0, : len(tokens)])


def greedy(model, prompt):
    tokens, logprobs = list(prompt), []
    for _ in range(GREEDY.max_new_tokens):
        last = full(model, tokens)[-1]
        tokens.append(int(last.argmax()))
        logprobs.append(last.max())
    return tokens[len(prompt) :], logprobs


def drain(engine):
    for _ in range(500):
        engine.step()
        if not engine.has_work:
            return
    raise AssertionError("the engine does not end")


def whole(engine):
    """Whether an idle engine has all of its slots and pages back."""
    allocator = engine._allocator
    kept = 0
    if allocator.prefixes is not None:
        allocator.prefixes.clear()
    pages = allocator.pages
    assert not engine.has_work and not engine._results
    if pages is not None:
        assert sorted(pages._free) == list(range(pages.count)), kept
        assert (allocator._table_bn == -1).all()
    return sorted(allocator._free_slots) == list(range(engine.config.slots))


CASES = [
    (name, config)
    for name in CONFIGS
    for config in (CONTIGUOUS, PAGED)
    if config is CONTIGUOUS or name not in ("mamba", "rwkv", "rwkv4")
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_greedy_is_the_argmax_of_full_forwards(name, config):
    model, engine = make(name), engine_of(name, config)
    results = engine.run([Request(prompt, GREEDY) for prompt in PROMPTS])
    seen = set()
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens, logprobs = greedy(model, prompt)
        assert result.tokens == tokens and result.finish_reason == "length"
        np.testing.assert_allclose(result.samples[0].logprobs, logprobs, atol=2e-4)
        seen.update(tokens)
    assert len(seen) > 3  # else it would prove little
    assert whole(engine)


def answers(results):
    return [[(s.tokens, s.logprobs) for s in result.samples] for result in results]


def test_a_request_without_probabilities_ends_by_nan():
    """A token's embedding is NaN: a request that has it fails, another does not."""
    want = engine_of("attention", CONTIGUOUS).run([Request([1, 2], GREEDY)])[0]
    absent = min(set(range(3, V)) - set(want.tokens))
    model = jax.tree.map(lambda a: a, make("attention"))
    table = model.embedding.table
    model.embedding.table = table.replace(table.get_value().at[absent, 0].set(np.nan))
    engine = Engine(model, CONTIGUOUS)
    good, bad = engine.run([Request([1, 2], GREEDY), Request([1, absent, 2], GREEDY)])
    assert (bad.finish_reason, bad.tokens) == ("nan", [])
    assert answers([good]) == answers([want]) and whole(engine)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_request_has_bit_for_bit_the_tokens_that_it_has_alone(name, config):
    """Whatever its slot and its neighbours."""
    engine = engine_of(name, config)
    requests = [
        Request(prompt, dataclasses.replace(SAMPLED, seed=seed), n=1 + seed % 2)
        for seed, prompt in enumerate(PROMPTS)
    ]
    alone = answers([engine.run([request])[0] for request in requests])
    assert answers(engine.run(requests)) == alone
    assert answers(engine.run(requests[::-1])) == alone[::-1]
    # late arrivals, and neighbours with other settings
    for request in requests[:2]:
        engine.add(Request([1, 2, 3], GREEDY))
        engine.step()
        assert answers(engine.run([request])) == [alone[requests.index(request)]]
        drain(engine)
    assert whole(engine)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_caches_of_few_bits_serve_each_request_alike(kind, dtype):
    page = dict(page=2) if kind == "paged" else {}
    cache = CacheConfig(kind, dtype=dtype, **page)
    engine = engine_of("attention", dataclasses.replace(CONTIGUOUS, cache=cache))
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    alone = answers([engine.run([request])[0] for request in requests])
    assert answers(engine.run(requests)) == alone
    want = [greedy(make("attention"), prompt) for prompt in PROMPTS]
    error = max(
        abs(logprobs[0] - exact[0]) for [(_, logprobs)], (_, exact) in zip(alone, want, strict=True)
    )
    assert 0 < error < (0.1 if dtype == "int8" else 1.0)


def test_a_request_that_lost_its_pages_has_the_same_tokens():
    engine = engine_of("hybrid", PAGED)
    small = dataclasses.replace(PAGED, cache=CacheConfig("paged", page=2, pages=14))
    requests = [
        Request(prompt, dataclasses.replace(SAMPLED, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    crowded = engine_of("hybrid", small)
    assert answers(crowded.run(requests)) == answers(engine.run(requests))
    assert crowded.stats.preemptions > 0 and crowded.stats.replayed > 0
    assert whole(crowded)


@pytest.mark.parametrize("name", ["attention", "sliding", "latent", "hybrid", "mamba"])
def test_a_shared_prefix_changes_no_bit(name):
    config = PAGED if name != "mamba" else CONTIGUOUS
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    requests = [
        Request([*prompt, *end], dataclasses.replace(SAMPLED, seed=seed))
        for seed, end in enumerate(([], [1], [2, 3, 4, 5], [2, 3, 4, 5, 6]))
    ]
    want = answers([engine_of(name, config).run([request])[0] for request in requests])
    engine = engine_of(name, dataclasses.replace(config, prefix=True))
    assert answers(engine.run(requests)) == want
    before = dataclasses.replace(engine.stats)
    assert answers(engine.run(requests)) == want
    computed = engine.stats.prefilled - before.prefilled
    assert engine.stats.shared - before.shared == 8 + 8 + 12 + 12
    assert computed == sum(len(request.tokens) - 1 for request in requests) - 40
    # another salt shares nothing
    shared = engine.stats.shared
    salted = dataclasses.replace(requests[0], salt="other")
    assert answers(engine.run([salted])) == want[:1]
    assert engine.stats.shared == shared
    assert whole(engine)


def test_prefixes_are_dropped_for_pages_that_are_needed():
    config = dataclasses.replace(PAGED, prefix=True, cache=CacheConfig("paged", page=2, pages=20))
    engine, other = engine_of("attention", config), engine_of("attention", PAGED)
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(0, V, 12).tolist()
        requests = [Request(prompt, dataclasses.replace(SAMPLED, seed=seed))] * 2
        assert answers(engine.run(requests)) == answers(other.run(requests))
    assert engine.stats.shared > 0 and len(engine._allocator.prefixes) <= 10
    assert whole(engine)


def test_nothing_is_compiled_after_warming_up():
    engine = Engine(make("hybrid"), dataclasses.replace(PAGED, prefix=True))
    engine.warm_up()
    compiled = []

    def listen(event, _, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda a: a + len(compiled))(1.5)
        assert len(compiled) == 1  # the listener hears compilations
        requests = [Request(p, GREEDY, n=2, echo=True) for p in PROMPTS]
        requests += [Request(p, dataclasses.replace(SAMPLED, logprobs=3)) for p in PROMPTS]
        engine.run(requests)
        assert len(compiled) == 1
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("config", [CONTIGUOUS, PAGED])
def test_what_was_left_in_memory_never_reaches_its_next_owner(config):
    engine = engine_of("hybrid", config)
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    want = answers(engine.run(requests))

    def poisoned(a):
        return a * np.nan if np.issubdtype(a.dtype, np.floating) else a

    states = jax.tree.map(poisoned, engine._runner._memory.states)
    engine._runner._memory = dataclasses.replace(engine._runner._memory, states=states)
    assert answers(engine.run(requests)) == want


def test_echo_gives_the_prompts_log_probabilities():
    model, engine = make("attention"), engine_of("attention", PAGED)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=1, logprobs=4)
    for prompt in PROMPTS:
        result = engine.run([Request(prompt, sampling, echo=True)])[0]
        want = full(model, prompt)
        assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(prompt)
        got = result.prompt_logprobs[1:]
        np.testing.assert_allclose(got, want[np.arange(len(prompt) - 1), prompt[1:]], atol=2e-4)
        for top, row in zip([*result.prompt_top[1:], result.samples[0].top[0]], want, strict=True):
            order = np.argsort(-row)[:4]
            assert [token for token, _ in top] == order.tolist()
            np.testing.assert_allclose([p for _, p in top], row[order], atol=2e-4)


def test_no_new_tokens_ends_after_the_prompt():
    engine = engine_of("attention", CONTIGUOUS)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=0)
    result = engine.run([Request([1, 2, 3], sampling, echo=True, n=2)])[0]
    assert [s.finish_reason for s in result.samples] == ["length"] * 2
    assert result.tokens == [] and len(result.prompt_logprobs) == 3
    assert whole(engine)


def test_a_stop_token_is_the_last():
    engine = engine_of("attention", CONTIGUOUS)
    free = engine.run([Request([1, 2], GREEDY)])[0].tokens
    sampling = dataclasses.replace(GREEDY, stop_tokens=(free[3],))
    result = engine.run([Request([1, 2], sampling)])[0]
    assert result.tokens == free[: free.index(free[3]) + 1] and result.finish_reason == "stop"


def test_samples_of_one_request_differ_and_share_its_prompt():
    engine = engine_of("hybrid", PAGED)
    before = engine.stats.prefilled
    result = engine.run([Request(PROMPTS[1], SAMPLED, n=3)])[0]
    assert len({tuple(s.tokens) for s in result.samples}) == 3
    assert engine.stats.prefilled - before == len(PROMPTS[1]) - 1
    more = engine.run([Request(PROMPTS[1], SAMPLED, n=5)])[0]  # more than slots
    assert answers([more])[0][:3] == answers([result])[0]
    assert whole(engine)


@pytest.mark.parametrize("config", [CONTIGUOUS, dataclasses.replace(PAGED, prefix=True)])
def test_cancelled_requests_free_their_memory(config):
    engine, random = engine_of("attention", config), np.random.default_rng(0)
    live: set[int] = set()
    for _ in range(300):
        if random.random() < 0.4:
            prompt = random.integers(0, V, random.integers(1, 12)).tolist()
            live.add(engine.add(Request(prompt, SAMPLED, n=int(random.integers(1, 3)))))
        if live and random.random() < 0.3:
            engine.cancel(int(random.choice(sorted(live))))
        for event in engine.step():
            if event.finish_reason and event.index == 0:
                live.discard(event.request)
        pages = engine._allocator.pages
        if pages is not None:
            held = sum(pages.holders(page) > 0 for page in range(pages.count))
            assert held + pages.free == pages.count
            for sequence in engine._running:
                assert all(pages.holders(page) > 0 for page in sequence.pages)
    drain(engine)
    assert whole(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(tokens=[]), "tokens=[]: must hold at least one token"),
        (dict(tokens="ab"), "tokens='ab': must be a list of tokens"),
        (dict(tokens=[1, V]), f"tokens[1]=17: must be an integer in [0, vocab_size={V})"),
        (dict(tokens=[True]), f"tokens[0]=True: must be an integer in [0, vocab_size={V})"),
        (dict(tokens=[1] * 30), "tokens='30 tokens': with max_new_tokens=12 exceed max_length=32"),
        (dict(n=0), "n=0: must be an integer in [1, 16]"),
        (dict(n=True), "n=True: must be an integer in [1, 16]"),
        (dict(n=17), "n=17: must be an integer in [1, 16]"),
        (dict(stop=("",)), "stop[0]='': must be a text, not ''"),
        (dict(stop=("a",)), "stop=('a',): requires a tokenizer"),
        (dict(stop="ab"), "stop='ab': must be a list of texts"),
        (dict(sampling=None), "sampling=None: must be of type SamplingConfig"),
        (dict(grammar="[a-z]+"), "grammar='[a-z]+': must be of type"),
        (dict(salt=None), "salt=None: must be of type str"),
        (dict(sampling=SamplingConfig(stop_tokens=(V,))), "stop_tokens[0]=17: must be below"),
        (dict(sampling=SamplingConfig(logit_bias=((V, 1.0),))), "logit_bias[0][0]=17: must be be"),
    ],
)
def test_bad_requests_are_refused_by_name(request_, message):
    engine = engine_of("attention", CONTIGUOUS)
    with pytest.raises(ConfigError) as error:
        engine.add(Request(**{"tokens": [1], "sampling": GREEDY, **request_}))
    assert str(error.value).startswith(message)
    assert whole(engine)


def test_a_prompt_that_exceeds_all_pages_and_a_full_queue_are_refused():
    config = dataclasses.replace(PAGED, cache=CacheConfig("paged", page=2, pages=8), queue=2)
    engine = Engine(make("attention"), config)
    with pytest.raises(ConfigError, match="^tokens='5 tokens': .* exceed all 8 pages"):
        engine.add(Request([1] * 5, GREEDY))
    first = [engine.add(Request([1], GREEDY)) for _ in range(2)]
    with pytest.raises(QueueFull, match="^queue=2: as many requests wait"):
        engine.add(Request([1], GREEDY))
    with pytest.raises(ConfigError, match="^tokens"):  # a later time would not help
        engine.add(Request([1] * 5, GREEDY))
    engine.cancel(first[0])
    engine.add(Request([1], GREEDY))


@pytest.mark.parametrize("last", [Request([V], GREEDY), Request([1], GREEDY, n=2)])
def test_a_run_with_a_request_that_is_refused_leaves_none_behind(last):
    engine = Engine(make("attention"), dataclasses.replace(CONTIGUOUS, queue=1))
    with pytest.raises(ConfigError):
        engine.run([Request([1], GREEDY), last])
    assert engine.waiting == engine.running == 0
    assert {event.finish_reason for event in engine.step()} == {"cancelled"}
    assert whole(engine)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("attention", dict(slots=0), "slots=0: must be > 0"),
        ("attention", dict(cache=CacheConfig("paged", page=3)), "cache.page=3: must divide"),
        ("attention", dict(prefix=True), "prefix=True: requires cache.kind='paged'"),
        ("attention", dict(snapshots=5), "snapshots=5: changes nothing: requires prefix=True"),
        ("learned", dict(max_length=33), "max_length=33: must be at most the model's 32"),
        ("mamba", dict(cache=CacheConfig("paged", page=2)), "cache.kind='paged'"),
    ],
)
def test_bad_configurations_are_refused_by_name(name, fields, message):
    with pytest.raises(ConfigError) as error:
        Engine(make(name), dataclasses.replace(CONTIGUOUS, **fields))
    assert str(error.value).startswith(message)


def test_memory_is_donated():
    engine = engine_of("attention", PAGED)
    before = engine._runner._memory
    engine.run([Request([1, 2, 3], GREEDY)])
    assert all(a.is_deleted() for a in jax.tree.leaves(before) if a.ndim > 2)
    (state,) = engine._runner._memory.states
    is_paged = [not isinstance(layer.mixer, KVCache) for layer in state]
    assert all(is_paged)
