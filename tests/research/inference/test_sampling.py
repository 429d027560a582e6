"""Sampling: filters against transformers, draws against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from layers.config import ConfigError
from research.inference import SamplingConfig, SamplingRows, sample
from research.inference.sampling import filter_logits

LOGITS = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32) * 2
FILTERS = {
    "temperature": dict(temperature=0.7),
    "top k": dict(top_k=5),
    "top k of one": dict(top_k=1),
    "top k of more than all": dict(top_k=100),
    "top p": dict(top_p=0.8),
    "top p of almost none": dict(top_p=1e-6),
    "top p of all": dict(top_p=1.0),
    "min p": dict(min_p=0.1),
    "min p of one": dict(min_p=1.0),
    "all": dict(temperature=1.7, top_k=12, top_p=0.9, min_p=0.05),
    "all, sharp": dict(temperature=0.3, top_k=7, top_p=0.6, min_p=0.2),
}


def rows_of(*configs, vocab=20, prompts=None):
    """Row r has configuration r and index r."""
    prompts = prompts or [()] * len(configs)
    ones = [
        SamplingRows.of(SamplingConfig(**config), vocab, prompt, index)
        for index, (config, prompt) in enumerate(zip(configs, prompts, strict=True))
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *ones)


def tokens_of(logits_bv, rows, position=0):
    return draw(logits_bv, np.full(len(logits_bv), position, np.int32), rows).token_b


draw = jax.jit(sample)
filtered = jax.jit(filter_logits)


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
    got = jax.nn.softmax(filtered(LOGITS, rows_of(*[options] * 6)), axis=-1)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.5, top_k=8, top_p=0.9, min_p=0.1)])
def test_draws_follow_the_exact_probabilities(options):
    config = SamplingConfig(**options)
    draws = 20_000
    logits = LOGITS[0].astype(np.float64)
    row = np.asarray(filter_logits(LOGITS[:1], rows_of(options)))[0]
    exact = np.where(np.isfinite(row), np.exp(logits / config.temperature), 0)
    exact /= exact.sum()
    many = jnp.broadcast_to(LOGITS[0], (draws, 20))
    tokens = tokens_of(many, rows_of(*[dict(seed=3, **options)] * draws))
    assert tokens.dtype == jnp.int32
    counts = np.bincount(tokens, minlength=20)
    assert not np.any(counts[exact == 0])
    kept = exact > 0
    assert stats.chisquare(counts[kept], draws * exact[kept]).pvalue > 0.01


def test_temperature_zero_is_the_likeliest_and_small_ones_approach_it():
    best = LOGITS.argmax(-1)
    for temperature in (0, 1e-30, 1e-3):
        options = dict(temperature=temperature, top_p=0.9, min_p=0.1, top_k=3)
        np.testing.assert_array_equal(tokens_of(LOGITS, rows_of(*[options] * 6)), best)


def test_equal_rows_draw_apart():
    equal = np.zeros((64, 20), np.float32)
    assert len(set(tokens_of(equal, rows_of(*[dict()] * 64)).tolist())) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0: must be > 0"),
        (dict(temperature=-0.1), "temperature=-0.1: must be ≥ 0"),
        (dict(temperature=float("nan")), "temperature=nan: must be a finite number"),
        (dict(temperature=float("inf")), "temperature=inf: must be a finite number"),
        (dict(top_k=0), "top_k=0: must be > 0 or None"),
        (dict(top_p=0.0), "top_p=0.0: must be in (0, 1] or None"),
        (dict(top_p=1.1), "top_p=1.1: must be in (0, 1] or None"),
        (dict(min_p=-0.5), "min_p=-0.5: must be in (0, 1] or None"),
        (dict(stop_tokens=(3, -1)), "stop_tokens[1]=-1: must be ≥ 0"),
        (dict(seed=-1), "seed=-1: must be in [0, 2**32)"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ConfigError) as raised:
        SamplingConfig(**options)
    assert str(raised.value) == message
