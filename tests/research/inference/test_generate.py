"""Generation against full forwards, one token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from layers.routing import MoeConfig
from research.inference import SamplingConfig, SamplingRows, generate

V = 17
BASE = DecoderConfig(
    vocab_size=V,
    width=16,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MlpConfig(24),
    init_std=1.0,
    tie_embeddings=False,
)
WINDOW = AttentionConfig(num_heads=4, num_kv_heads=2, window=5)
CONFIGS = {
    "rotary": dict(),
    "sliding": dict(pattern=("sliding", "attention"), attention=WINDOW),
    "all sliding, unrolled": dict(pattern=("sliding",), attention=WINDOW, scan=False),
    "alibi": dict(position="alibi"),
    "learned": dict(position="learned", max_length=32),
    "sinusoidal": dict(position="sinusoidal"),
    "experts": dict(feed_forward=("moe",), moe=MoeConfig(4, 24)),
}
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [16, 0, 16, 0]]
NEW = 12  # past the window of 5, and past 8, the tokens streamed at a time
GREEDY = SamplingConfig(max_new_tokens=NEW, temperature=0)


@functools.cache
def make(name):
    model = Decoder(dataclasses.replace(BASE, **CONFIGS[name]), rngs=nnx.Rngs(0))
    # sharper than at the start, so that the context matters to the choice
    return jax.tree.map(lambda a: a * 2 if a.ndim > 2 else a, model)


@jax.jit
def forward(model, tokens):
    return model(tokens).logits_btv


def last_logits(model, tokens):
    """Of the full forward, no cache; padded on the right, which causality hides."""
    row = np.zeros((1, 32), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(forward(model, row)[0, len(tokens) - 1])


def greedy(model, prompt, count=NEW):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(last_logits(model, tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_argmax_of_full_forwards_for_a_ragged_batch(name):
    model = make(name)
    want = [greedy(model, prompt) for prompt in PROMPTS]
    assert len({token for row in want for token in row}) > 3  # else it would prove little
    assert generate(model, PROMPTS, GREEDY) == want


def test_a_row_alone_is_the_row_in_a_batch():
    model = make("sliding")
    together = generate(model, PROMPTS, GREEDY)
    assert [generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS] == together


def test_generation_drops_no_token():
    """A capacity depends on how many tokens follow, which generation does not know."""
    model = make("experts")
    moe = dataclasses.replace(model.config.moe, capacity_factor=0.5)
    config = dataclasses.replace(model.config, moe=moe)
    limited = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))),
        jax.tree.leaves(model),
    )
    assert np.any(
        forward(limited, np.array([PROMPTS[1]])) != forward(model, np.array([PROMPTS[1]]))
    )
    assert generate(limited, PROMPTS, GREEDY) == generate(model, PROMPTS, GREEDY)


def test_sampling_repeats_under_its_seed_and_ignores_the_rows_beside():
    model = make("rotary")
    config = SamplingConfig(max_new_tokens=NEW, temperature=1.5, top_p=0.95)
    first = generate(model, PROMPTS, config)
    assert generate(model, PROMPTS, config) == first
    assert generate(model, PROMPTS[:1], config)[0] == first[0]
    assert generate(model, PROMPTS, dataclasses.replace(config, seed=1)) != first
    assert all(0 <= token < V for row in first for token in row)


def test_sampled_tokens_follow_the_models_probabilities():
    """The first two tokens together, against the product of full-forward probabilities."""
    stats = pytest.importorskip("scipy.stats")
    model, prompt, rows = make("rotary"), [5, 9], 4096
    config = SamplingConfig(max_new_tokens=2, temperature=2.0, top_k=3)

    def probabilities(tokens):
        logits = last_logits(model, tokens).astype(np.float64) / 2.0
        weights = np.where(logits >= np.sort(logits)[-3], np.exp(logits - logits.max()), 0)
        return weights / weights.sum()

    first = probabilities(prompt)
    exact = np.zeros((V, V))
    for token in np.flatnonzero(first):
        exact[token] = first[token] * probabilities([*prompt, int(token)])
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.array(generate(model, [prompt] * rows, config)).T), 1)
    kept = exact > 0
    assert not np.any(counts[~kept])
    assert stats.chisquare(counts[kept], rows * exact[kept]).pvalue > 0.01


def test_penalties_count_the_prompt_and_the_tokens_of_each_row():
    """OpenAI's and transformers' formulas on full forwards, in float64."""
    model = make("rotary")
    options = dict(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=2.0)

    def penalised(prompt):
        new = []
        for _ in range(NEW):
            scores = last_logits(model, [*prompt, *new]).astype(np.float64)
            scores[4] += 3
            for token in {*prompt, *new}:
                scores[token] *= 1.5 if scores[token] < 0 else 1 / 1.5
            counts = np.bincount(new, minlength=V)
            new.append(int((scores - 2 * counts - 0.5 * (counts > 0)).argmax()))
        return new

    config = dataclasses.replace(GREEDY, logit_bias=((4, 3.0),), **options)
    want = [penalised(prompt) for prompt in PROMPTS]
    assert generate(model, PROMPTS, config) == want != generate(model, PROMPTS, GREEDY)


def test_no_new_tokens_are_none():
    model, none = make("rotary"), dataclasses.replace(GREEDY, max_new_tokens=0)
    assert generate(model, PROMPTS, none) == [[] for _ in PROMPTS]


def test_a_stop_token_ends_its_row_and_is_its_last():
    model = make("rotary")
    free = generate(model, PROMPTS, GREEDY)
    stop = free[1][2]
    config = dataclasses.replace(GREEDY, stop_tokens=(stop,))

    def cut(row):
        return row[: row.index(stop) + 1] if stop in row else row

    assert generate(model, PROMPTS, config) == [cut(row) for row in free]
    assert generate(model, PROMPTS, dataclasses.replace(GREEDY, stop_tokens=tuple(range(V)))) == [
        row[:1] for row in free
    ]


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(stop_tokens=(1, 2, 3, 4))])
def test_streaming_gives_the_same_tokens_in_order(options):
    model, config = make("sliding"), SamplingConfig(max_new_tokens=NEW, **options)
    seen = [[] for _ in PROMPTS]
    rows = generate(model, PROMPTS, config, stream=lambda row, token: seen[row].append(token))
    assert seen == rows == generate(model, PROMPTS, config)


def test_a_new_length_in_the_same_bucket_or_a_new_seed_compiles_nothing():
    import sys

    module = sys.modules[generate.__module__]
    model, config = make("rotary"), SamplingConfig(max_new_tokens=NEW)
    generate(model, [[1, 2, 3]], config)
    before = module._prefill._cache_size(), module._decode._cache_size()
    generate(model, [list(range(9))], dataclasses.replace(config, seed=7))
    assert (module._prefill._cache_size(), module._decode._cache_size()) == before


def test_the_cache_is_donated_and_rolls():
    import sys

    module = sys.modules[generate.__module__]
    model = make("all sliding, unrolled")
    state = model.init_state(1, 1000)
    assert state[0].mixer.capacity == 5
    rows = SamplingRows.empty(1, V)
    progress = module._Progress(
        state, rows, jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)
    )
    module._decode(model, progress, np.zeros(0, np.int32), 3, most=3)
    assert state[0].mixer.keys.codes.is_deleted()


def test_max_length_is_reached_exactly():
    model = make("learned")
    prompt = list(range(10)) * 2
    for options in (dict(), dict(max_length=32)):
        assert generate(model, [prompt, [1]], GREEDY, **options)[0] == greedy(model, prompt)
    assert generate(make("rotary"), [[1, 2, 3]], GREEDY, max_length=15)[0] == greedy(
        make("rotary"), [1, 2, 3]
    )


@pytest.mark.parametrize(
    ("name", "prompts", "max_length", "message"),
    [
        ("rotary", [], None, "prompts=[]: must hold at least one prompt"),
        ("rotary", [[1], []], None, "prompts[1]=[]: must hold at least one token"),
        ("rotary", [1, 2], None, "prompts[0]=1: must be a list of tokens"),
        ("rotary", ["ab"], None, "prompts[0]='ab': must be a list of tokens"),
        ("rotary", [[1, 17]], None, "prompts[0][1]=17: must be an integer in [0, vocab_size=17)"),
        ("rotary", [[-1]], None, "prompts[0][0]=-1: must be an integer in [0, vocab_size=17)"),
        ("rotary", [[1.5]], None, "prompts[0][0]=1.5: must be an integer in [0, vocab_size=17)"),
        ("rotary", [[1]], 0, "max_length=0: must be > 0 or None"),
        ("rotary", [[1], [1, 2, 3, 4]], 15,
         "len(prompts[1])=4: with max_new_tokens=12 exceeds max_length=15"),
        ("learned", [[1] * 21], None,
         "len(prompts[0])=21: with max_new_tokens=12 exceeds the model's max_length=32"),
        ("learned", [[1] * 21], 100,
         "len(prompts[0])=21: with max_new_tokens=12 exceeds the model's max_length=32"),
    ],
)  # fmt: skip
def test_refuses_before_compiling(name, prompts, max_length, message):
    with pytest.raises(ConfigError) as raised:
        generate(make(name), prompts, GREEDY, max_length=max_length)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stop_tokens=(1, 17)), "stop_tokens[1]=17: must be below vocab_size=17"),
        (dict(logit_bias=((17, 1.0),)), "logit_bias[0][0]=17: must be below vocab_size=17"),
        (dict(logprobs=0), "logprobs=0: generate() returns tokens only"),
    ],
)
def test_refuses_what_the_model_cannot_choose_or_generate_does_not_return(options, message):
    with pytest.raises(ConfigError) as raised:
        generate(make("rotary"), [[1]], dataclasses.replace(GREEDY, **options))
    assert str(raised.value) == message


def test_the_layers_of_a_stack_are_not_copied_for_each_token(monkeypatch):
    """In the compiled program that decodes; a stack would require a copy of its weights."""
    import sys

    module = sys.modules[generate.__module__]
    decode, calls = module._decode, []

    def recorded(*arguments, most):
        calls.append(jax.eval_shape(lambda *a: a, *arguments))
        return decode(*arguments, most=most)

    monkeypatch.setattr(module, "_decode", recorded)
    config = dataclasses.replace(BASE, width=256, num_layers=3, mlp=MlpConfig(688), scan=True)
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    generate(model, [[1, 2, 3]], GREEDY)
    compiled = decode.lower(*calls[0], most=NEW).compile()
    weights = sum(a.nbytes for a in jax.tree.leaves(model))
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.1 * weights
