"""Sampling: the law of each row against transformers, OpenAI's formula and float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layers.config import ConfigError
from research.inference import SamplingConfig, SamplingRows, sample
from research.inference.sampling import filter_logits, penalise

V, ROWS = 20, 6
LOGITS = np.random.default_rng(0).normal(size=(ROWS, V)).astype(np.float32) * 2
FILTERS = {
    "temperature": dict(temperature=0.7),
    "top k": dict(top_k=5),
    "top k of one": dict(top_k=1),
    "top k of more than all": dict(top_k=100),
    "top p": dict(top_p=0.8),
    "top p of almost none": dict(top_p=1e-6),
    "top p below float32": dict(top_p=1e-60),
    "top p of all": dict(top_p=1.0),
    "min p": dict(min_p=0.1),
    "min p of one": dict(min_p=1.0),
    "all": dict(temperature=1.7, top_k=12, top_p=0.9, min_p=0.05),
    "all, sharp": dict(temperature=0.3, top_k=7, top_p=0.6, min_p=0.2),
}
EVERYTHING = dict(
    temperature=1.3, top_k=15, top_p=0.95, min_p=0.01, seed=5, logprobs=20,
    repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.7,
    logit_bias=((2, 1.5), (7, -4.0)),
)  # fmt: skip

draw, filtered, penalised = jax.jit(sample), jax.jit(filter_logits), jax.jit(penalise)


def rows_of(*configs, prompts=None, counts=None):
    """Row r has configuration r and index r."""
    prompts = prompts or [()] * len(configs)
    ones = [
        SamplingRows.of(SamplingConfig(**config), V, prompt, index)
        for index, (config, prompt) in enumerate(zip(configs, prompts, strict=True))
    ]
    rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *ones)
    return rows if counts is None else dataclasses.replace(rows, counts_bv=counts)


def tokens_of(logits_bv, rows, position=0):
    return draw(logits_bv, np.full(len(logits_bv), position, np.int32), rows).token_b


def exact_law(logits, config, prompt=(), counts=0, allowed=True):
    """The probability of each token in float64, from the definitions; one row."""
    counts = np.zeros(V, int) + counts
    scores = logits.astype(np.float64)
    for token, bias in config.logit_bias:
        scores[token] += bias
    for token in range(V):
        if counts[token] or token in prompt:
            factor = config.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    scores -= config.frequency_penalty * counts
    scores -= config.presence_penalty * (counts > 0)
    scores[~(np.zeros(V, bool) | allowed)] = -np.inf
    if config.temperature == 0:
        return np.eye(V)[scores.argmax()]
    weights = np.exp((scores - scores.max()) / config.temperature)
    if config.top_k is not None:
        weights[weights < np.sort(weights)[-min(config.top_k, V)]] = 0
    if config.top_p is not None:
        likelier = np.array([weights[weights > w].sum() for w in weights])
        weights[likelier >= config.top_p * weights.sum()] = 0
    if config.min_p is not None:
        weights[weights < config.min_p * weights.max()] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_filters_match_transformers(options):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor(LOGITS)
    scores = hf.TemperatureLogitsWarper(options.get("temperature", 1.0))(None, scores)
    if "top_k" in options:
        scores = hf.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = hf.TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = hf.MinPLogitsWarper(options["min_p"])(None, scores)
    want = torch.softmax(scores, -1).numpy()
    got = jax.nn.softmax(filtered(LOGITS, rows_of(*[options] * ROWS)), axis=-1)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("penalty", [1.3, 0.5, 100.0])
def test_repetition_penalty_matches_transformers(penalty):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    prompts = [[0, 3, 3], [5], [1, 2, 19], [7], [8, 9], [10, 11, 12]]
    generated = np.random.default_rng(1).integers(0, V, (ROWS, 8))
    rows = rows_of(*[dict(repetition_penalty=penalty)] * ROWS, prompts=prompts)
    for step in range(8):
        rows = rows.counted(jnp.asarray(generated[:, step]), jnp.ones(ROWS, bool))
    got = penalised(LOGITS, rows)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *generated[row]]])
        scores = torch.tensor(LOGITS[row : row + 1])
        want = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
        np.testing.assert_allclose(got[row], want[0], rtol=1e-6)


def test_presence_and_frequency_penalties_are_openais_formula():
    """mu[j] − c[j]·alpha_frequency − float(c[j] > 0)·alpha_presence, with c of sampled tokens."""
    counts = np.zeros((ROWS, V), np.int32)
    counts[:, :4] = [0, 1, 2, 7]
    config = dict(presence_penalty=0.75, frequency_penalty=-1.25)
    prompts = [[1, 5]] * ROWS  # not counted
    got = penalised(LOGITS, rows_of(*[config] * ROWS, prompts=prompts, counts=counts))
    want = LOGITS - counts * -1.25 - (counts > 0).astype(float) * 0.75
    np.testing.assert_allclose(got, want, atol=1e-6)


UNIT = st.floats(0.05, 1)
CONFIGS = st.fixed_dictionaries(
    dict(temperature=st.sampled_from([0, 0.5, 1, 2.0])),
    optional=dict(
        top_k=st.integers(1, 25),
        top_p=UNIT,
        min_p=UNIT,
        repetition_penalty=st.floats(0.5, 3),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5)).map(
            lambda biases: tuple(biases.items())
        ),
    ),
)


@settings(max_examples=60, deadline=None)
@given(configs=st.lists(CONFIGS, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 2**32 - 1))
def test_each_row_has_the_law_of_its_own_settings_in_this_order(configs, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(ROWS, V)).astype(np.float32) * 2
    counts = random.integers(0, 3, (ROWS, V), dtype=np.int32)
    prompts = random.integers(0, V, (ROWS, 3)).tolist()
    allowed = random.random((ROWS, V)) < 0.7
    allowed[:, 0] = True
    rows = rows_of(*configs, prompts=prompts, counts=counts)
    scores = np.where(allowed, penalised(logits, rows), -np.inf).astype(np.float32)
    got = np.asarray(jax.nn.softmax(filtered(scores, rows), axis=-1))
    chosen = draw(logits, np.zeros(ROWS, np.int32), rows, allowed).token_b
    for row, options in enumerate(configs):
        config = SamplingConfig(**options)
        want = exact_law(logits[row], config, prompts[row], counts[row], allowed[row])
        if config.temperature > 0:
            np.testing.assert_allclose(got[row], want, atol=2e-5)
        assert want[chosen[row]] > 0


@pytest.mark.parametrize("options", [dict(), EVERYTHING], ids=["nothing", "everything"])
def test_draws_follow_the_exact_probabilities(options):
    draws, prompt = 20_000, [1, 4, 4]
    counts = np.zeros(V, np.int32)
    counts[[0, 4, 9]] = [1, 3, 2]
    one = SamplingRows.of(SamplingConfig(**options), V, prompt)
    many = jax.tree.map(lambda a: np.repeat(a, draws, axis=0), one)
    rows = dataclasses.replace(
        many, counts_bv=np.tile(counts, (draws, 1)), index_b=np.arange(draws, dtype=np.int32)
    )
    tokens = tokens_of(np.tile(LOGITS[0], (draws, 1)), rows)
    assert tokens.dtype == jnp.int32
    exact = exact_law(LOGITS[0], SamplingConfig(**options), prompt, counts)
    seen = np.bincount(tokens, minlength=V)
    kept = exact > 0
    assert not np.any(seen[~kept])
    assert stats.chisquare(seen[kept], draws * exact[kept]).pvalue > 0.01


@pytest.mark.parametrize("options", [dict(top_k=3), dict(top_p=0.6), dict(min_p=0.1)])
def test_filters_tell_neighbouring_floats_apart(options):
    """The third logit is the next float below the second; what is tied with the last stays."""
    logits = np.full((ROWS, V), -100, np.float32)
    for row, least in enumerate(np.geomspace(1e-3, 2, ROWS, dtype=np.float32)):
        logits[row, :6] = 0, -least, -least, *[-np.nextafter(least, 9, dtype=np.float32)] * 2, -3
    exact = [exact_law(row, SamplingConfig(**options)) > 0 for row in logits]
    got = filtered(logits, rows_of(*[options] * ROWS)) > -np.inf
    np.testing.assert_array_equal(got, exact)


def test_temperature_zero_is_the_likeliest_and_small_ones_approach_it():
    best = LOGITS.argmax(-1)
    for temperature in (0, 1e-60, 1e-40, 1e-30, 1e-3):
        options = dict(temperature=temperature, top_p=0.9, min_p=0.1, top_k=3)
        np.testing.assert_array_equal(tokens_of(LOGITS, rows_of(*[options] * ROWS)), best)


def test_a_temperature_beyond_float32_is_uniform_over_what_is_allowed():
    rows = rows_of(*[dict(temperature=1e300, seed=seed) for seed in range(ROWS)])
    allowed = np.zeros((ROWS, V), bool)
    allowed[:, [3, 8]] = True
    tokens = [
        draw(LOGITS, np.full(ROWS, position, np.int32), rows, allowed).token_b
        for position in range(5)
    ]
    assert set(np.concatenate(tokens).tolist()) == {3, 8}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def only(rows, row):
    """Row ``row`` of ``rows``, or of what was sampled, as a batch of one."""
    return jax.tree.map(lambda a: np.asarray(a)[row : row + 1], rows)


def test_a_row_does_not_depend_on_the_settings_or_logits_beside_it():
    """Bit for bit, in one program: a plain row beside rows that use everything, and reversed."""
    position = np.arange(ROWS, dtype=np.int32)
    plain, all_ = rows_of(*[dict(seed=3)] * ROWS), rows_of(*[EVERYTHING] * ROWS)
    greedy = rows_of(*[dict(temperature=0)] * ROWS)
    others = -LOGITS
    for mine in (plain, all_, greedy):
        alone = draw(LOGITS, position, mine)
        for beside in (plain, all_, greedy):
            for row in (0, ROWS - 1):
                mixed = beside.set_row(row, only(mine, row))
                logits = others.copy()
                logits[row] = LOGITS[row]
                got = draw(logits, position, mixed)
                assert_equal(only(got, row), only(alone, row))


def test_the_key_is_of_seed_index_and_position():
    flat = np.zeros((64, V), np.float32)
    one = SamplingRows.of(SamplingConfig(seed=2**32 - 1), V, index=3)
    rows = jax.tree.map(lambda a: np.repeat(a, 64, axis=0), one)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(np.uint32(2**32 - 1)), 3), 9)
    want = jax.random.categorical(key, flat[0])
    assert set(tokens_of(flat, rows, position=9).tolist()) == {int(want)}  # in every slot
    several = np.arange(64)
    for changed in (
        tokens_of(flat, dataclasses.replace(rows, seed_b=several.astype(np.uint32))),
        tokens_of(flat, dataclasses.replace(rows, index_b=several.astype(np.int32))),
        draw(flat, several.astype(np.int32), rows).token_b,
    ):
        assert len(set(changed.tolist())) > 10


def test_a_row_is_set_and_counted_inside_a_program():
    configs = [dict(), EVERYTHING, dict(top_k=1)]
    want = rows_of(*configs, prompts=[[1], [2, 2], [3]])
    rows = SamplingRows.empty(3, V)
    put = jax.jit(SamplingRows.set_row)
    for row in (2, 0, 1):
        rows = put(rows, row, only(want, row))
    assert_equal(rows, want)
    assert put._cache_size() == 1
    counted = jax.jit(SamplingRows.counted)
    rows = counted(rows, np.array([4, 5, 6]), np.array([True, False, True]))
    rows = counted(rows, np.array([4, 5, 4]), np.array([True, True, True]))
    assert [np.flatnonzero(row).tolist() for row in rows.counts_bv] == [[4], [5], [4, 6]]
    assert rows.counts_bv[0, 4] == 2
    rows = put(rows, 0, SamplingRows.of(SamplingConfig(), V))
    assert not rows.counts_bv[0].any() and rows.counts_bv[1].any()


def test_log_probabilities_are_the_models_own():
    """Float64 log-softmax of the logits as they are, whatever chooses the token."""
    configs = [EVERYTHING, dict(temperature=0), dict(logprobs=0), dict(logprobs=1, top_k=2)]
    rows = rows_of(*configs, EVERYTHING, EVERYTHING)
    got = draw(LOGITS, np.zeros(ROWS, np.int32), rows)
    exact = LOGITS.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    chosen = np.take_along_axis(exact, np.asarray(got.token_b)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(got.logprob_b, chosen, atol=1e-6)
    for row in (0, 3, 4, 5):
        order = np.argsort(-exact[row])
        np.testing.assert_array_equal(got.top_ids_b20[row], order[:20])
        np.testing.assert_allclose(got.top_logprobs_b20[row], exact[row][order[:20]], atol=1e-6)
    for row in (1, 2):
        assert set(got.top_ids_b20[row].tolist()) == {-1}
        assert set(got.top_logprobs_b20[row].tolist()) == {-np.inf}


def test_a_vocabulary_of_less_than_twenty_tokens_has_as_many_log_probabilities():
    one = SamplingRows.of(SamplingConfig(logprobs=20), 3)
    got = draw(LOGITS[:1, :3], np.zeros(1, np.int32), one)
    assert sorted(got.top_ids_b20[0].tolist()) == [-1] * 17 + [0, 1, 2]
    assert np.isfinite(got.top_logprobs_b20[0]).sum() == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens=-1: must be ≥ 0"),
        (dict(max_new_tokens=True), "max_new_tokens=True: must be of type int, not bool"),
        (dict(temperature=-0.1), "temperature=-0.1: must be ≥ 0"),
        (dict(temperature=float("nan")), "temperature=nan: must be a finite number"),
        (dict(temperature=float("inf")), "temperature=inf: must be a finite number"),
        (dict(temperature=True), "temperature=True: must be of type float, not bool"),
        (dict(top_k=0), "top_k=0: must be > 0 or None"),
        (dict(top_k=True), "top_k=True: must be of type int, not bool"),
        (dict(top_k=1.0), "top_k=1.0: must be of type int, not float"),
        (dict(top_p=0.0), "top_p=0.0: must be in (0, 1] or None"),
        (dict(top_p=1.1), "top_p=1.1: must be in (0, 1] or None"),
        (dict(min_p=-0.5), "min_p=-0.5: must be in (0, 1] or None"),
        (dict(min_p=False), "min_p=False: must be of type float, not bool"),
        (dict(stop_tokens=(3, -1)), "stop_tokens[1]=-1: must be ≥ 0"),
        (dict(stop_tokens=(True,)), "stop_tokens[0]=True: must be of type int, not bool"),
        (dict(seed=-1), "seed=-1: must be in [0, 2**32)"),
        (dict(seed=2**32), "seed=4294967296: must be in [0, 2**32)"),
        (dict(seed=2**70), "seed=1180591620717411303424: must be an integer of at most 64 bits"),
        (dict(repetition_penalty=0), "repetition_penalty=0.0: must be in [0.01, 100]"),
        (dict(repetition_penalty=-1), "repetition_penalty=-1.0: must be in [0.01, 100]"),
        (dict(repetition_penalty=1e3), "repetition_penalty=1000.0: must be in [0.01, 100]"),
        (dict(presence_penalty=-2.1), "presence_penalty=-2.1: must be in [-2, 2]"),
        (dict(frequency_penalty=3), "frequency_penalty=3.0: must be in [-2, 2]"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty=nan: must be a finite number"),
        (dict(logit_bias=((-1, 1.0),)), "logit_bias[0][0]=-1: must be ≥ 0"),
        (dict(logit_bias=((1, 1), (1, 2))), "logit_bias[1][0]=1: must be given once"),
        (dict(logit_bias=((1, -101),)), "logit_bias[0][1]=-101.0: must be in [-100, 100]"),
        (dict(logit_bias=((True, 1.0),)), "logit_bias[0][0]=True: must be of type int, not bool"),
        (dict(logit_bias=((1, 2, 3),)), "logit_bias[0]=(1, 2, 3): must hold 2 values"),
        (dict(logit_bias={1: 2}), "logit_bias={1: 2}: must be a list"),
        (dict(logprobs=21), "logprobs=21: must be in [0, 20] or None"),
        (dict(logprobs=-1), "logprobs=-1: must be in [0, 20] or None"),
        (dict(logprobs=True), "logprobs=True: must be of type int, not bool"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ConfigError) as raised:
        SamplingConfig(**options)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logit_bias=((3, 1), (20, 1))), "logit_bias[1][0]=20: must be below vocab_size=20"),
        (dict(stop_tokens=(19, 20)), "stop_tokens[1]=20: must be below vocab_size=20"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(options, message):
    with pytest.raises(ConfigError) as raised:
        SamplingRows.of(SamplingConfig(**options), V)
    assert str(raised.value) == message
