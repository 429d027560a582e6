"""Rotary embedding against complex numbers, Hugging Face, and its own invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.config import ConfigError
from layers.rotary import RotaryConfig, RotaryScaling, frequencies, rotary


def complex_form(x, positions, base=10_000.0):
    """Eq. 13 of the paper, pairs as complex numbers times ``e^{ipθ}``, float64, interleaved."""
    c = x.shape[-1]
    theta = base ** (-2.0 * np.arange(c // 2) / c)
    z = x[..., 0::2] + 1j * x[..., 1::2]
    z = z * np.exp(1j * positions[:, :, None, None] * theta)
    return np.stack((z.real, z.imag), -1).reshape(x.shape)


X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
NEAR = np.array([[0, 1, 2, 3, 4], [7, 9, 30, 31, 500]], np.int32)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_interleaved_is_the_papers_complex_product(base):
    got = rotary(X, NEAR, base=base, interleaved=True)
    np.testing.assert_allclose(got, complex_form(X.astype(np.float64), NEAR, base), atol=1e-4)


def test_halves_are_the_interleaved_form_with_channels_permuted():
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # evens first: pairs (0,1) become (0, c/2)
    halves = rotary(X[..., order], NEAR)
    np.testing.assert_allclose(halves, rotary(X, NEAR, interleaved=True)[..., order], atol=1e-6)


def test_matches_hugging_face():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theta = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    angles = NEAR[..., None] * theta
    cos, sin = (torch.tensor(np.concatenate((f(angles),) * 2, -1)) for f in (np.cos, np.sin))
    x = torch.tensor(X.astype(np.float64)).transpose(1, 2)
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    np.testing.assert_allclose(rotary(X, NEAR), want.transpose(1, 2).numpy(), atol=1e-4)


def test_a_fraction_rotates_the_first_channels_and_passes_the_rest():
    got = rotary(X, NEAR, fraction=0.5)
    np.testing.assert_array_equal(got[..., 4:], X[..., 4:])
    np.testing.assert_array_equal(got[..., :4], rotary(X[..., :4], NEAR))


@pytest.mark.parametrize("where", [10_000, 100_000])
def test_float32_angles_far_away(where):
    """The angle p·θ is float32, so at p = 100,000 it is known to about p·2⁻²³ = 0.012 radians."""
    positions = np.array([[where - 2, where - 1, where]] * 2, np.int32)
    x = X[:, :3] / np.abs(X[:, :3]).max()
    got = np.asarray(rotary(x, positions, interleaved=True), np.float64)
    want = complex_form(x.astype(np.float64), positions)
    assert np.abs(got - want).max() < 1.5 * where * 2**-23


@jax.jit
def score(q, k, p, s, shift):
    where = jnp.stack((p, s))[None] + shift
    qk = rotary(jnp.stack((q, k))[None, :, None], where)
    return jnp.vdot(qk[0, 0], qk[0, 1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_scores_depend_on_the_difference_of_positions_alone(p, s, shift):
    q, k = X[0, 0, 0], X[0, 1, 0]
    a, b = score(q, k, p, s, 0), score(q, k, p, s, shift)
    np.testing.assert_allclose(a, b, atol=5e-3)


def test_keeps_lengths_dtype_and_position_zero():
    y = rotary(jnp.asarray(X, jnp.bfloat16), NEAR)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.linalg.norm(rotary(X, NEAR), axis=-1), np.linalg.norm(X, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(rotary(X, np.zeros((1, 5), np.int32)), X)


@pytest.mark.parametrize(
    "scaling",
    [
        RotaryScaling("yarn", 9e29, 2e-30, 9e29, original_length=1),
        RotaryScaling("yarn", original_length=2**62),
        RotaryScaling("dynamic", 9e29, original_length=1, length=2**62),
    ],
)
@pytest.mark.parametrize("base", [1 + 1e-15, 1e308])
def test_extreme_numbers_give_frequencies(scaling, base):
    assert scaling(frequencies(8, base), base).shape == (4,)


def test_scaling_maps_the_frequencies():
    """Position interpolation by 2: position 2p turns as far as p did."""
    got = rotary(X, 2 * NEAR, scaling=lambda theta, base: theta / 2)
    np.testing.assert_allclose(got, rotary(X, NEAR), atol=1e-4)


SHORT = tuple(1 + 0.1 * i for i in range(16))
LONG = tuple(1.5 + i for i in range(16))
ORIGINAL = {"original_max_position_embeddings": 64}
LONGROPE = dict(rope_type="longrope", short_factor=[*SHORT], long_factor=[*LONG], **ORIGINAL)


@pytest.mark.parametrize(
    "fields, length, scaling",
    [
        (dict(rope_type="linear", factor=4.0), None, RotaryScaling("linear", 4.0)),
        (
            dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 **ORIGINAL),
            None,
            RotaryScaling("llama3", 8.0, original_length=64),
        ),
        *(
            (dict(rope_type="dynamic", factor=3.0), length,
             RotaryScaling("dynamic", 3.0, original_length=640, length=length))
            for length in (None, 7, 640, 641, 5000)
        ),
        *(
            (dict(rope_type="yarn", factor=6.0, truncate=truncate, **ORIGINAL), None,
             RotaryScaling("yarn", 6.0, 1, 32, 64, truncate=truncate))
            for truncate in (True, False)
        ),
        *(
            (dict(LONGROPE, **extra), length,
             RotaryScaling("longrope", extra.get("factor", 10.0), original_length=64,
                           magnitude=extra.get("attention_factor"), length=length,
                           short_factors=SHORT, long_factors=LONG))
            for length, extra in (
                (None, {}), (64, {}), (65, {}), (640, {"factor": 2.5}), (9, {"factor": 1.0}),
                (640, {"attention_factor": 1.3}),
            )
        ),
    ],
)  # fmt: skip
def test_scalings_are_those_of_transformers(fields, length, scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=1, max_position_embeddings=640,
        rope_parameters=dict(fields, rope_theta=1e4),
    )  # fmt: skip
    want, growth = ROPE_INIT_FUNCTIONS[fields["rope_type"]](theirs, "cpu", seq_len=length)
    np.testing.assert_allclose(scaling(frequencies(32, 1e4), 1e4), want.numpy(), rtol=1e-6)
    assert scaling.growth == pytest.approx(growth, rel=1e-9)


@pytest.mark.parametrize(
    "length, base, turns, magnitude",
    [(4096, 1e4, (32, 1), None), (32768, 1e6, (20, 2), 1.1), (8, 1e4, (32, 1), 0.9)],
)
def test_yarn_is_that_of_transformers(length, base, turns, magnitude):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama as llama

    rope = dict(
        rope_type="yarn", rope_theta=base, factor=6.0, original_max_position_embeddings=length,
        beta_fast=turns[0], beta_slow=turns[1],
    )  # fmt: skip
    if magnitude is not None:
        rope["attention_factor"] = magnitude
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=rope)
    scaling = RotaryScaling("yarn", 6.0, turns[1], turns[0], length, magnitude)
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 64)).astype(np.float32)
    at = np.array([[0, 1, 7, 100, 999]], np.int32)
    torch = pytest.importorskip("torch")
    heads = torch.tensor(x).transpose(1, 2)
    cos, sin = llama.LlamaRotaryEmbedding(config)(heads, torch.tensor(at))
    want, _ = llama.apply_rotary_pos_emb(heads, heads, cos, sin)
    got = RotaryConfig(base, scaling=scaling)(x, at)
    np.testing.assert_allclose(got, want.transpose(1, 2), atol=3e-4)
    kept = scaling(frequencies(64, base), base) / frequencies(64, base)
    # what turns least is slowed by all of the factor
    assert kept[-1] == pytest.approx(1 / 6) and np.all(np.diff(kept) <= 1e-6)


def longrope(short, **fields):
    return RotaryScaling("longrope", short_factors=short, long_factors=(1.0,), **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryScaling("ntk"), "^kind='ntk': must be one of linear, dynamic, llama3"),
        (lambda: RotaryScaling("yarn", magnitude=0.0), "^magnitude=0.0: must be > 0 or None$"),
        (lambda: RotaryScaling(factor=0.0), "^factor=0.0: must be > 0$"),
        (
            lambda: RotaryScaling("dynamic", 1e300),
            "^factor=1e.300: must be between 1e-30 and 1e30$",
        ),
        (
            lambda: RotaryScaling("yarn", low_turns=1e-320),
            "^low_turns=1e-320: must be between 1e-30",
        ),
        (lambda: RotaryScaling("yarn", high_turns=1e308), "^high_turns=1e.308: must be between"),
        (lambda: RotaryScaling(low_turns=4.0), "^high_turns=4.0: must be > low_turns=4.0$"),
        (lambda: RotaryScaling(length=4), "^length=4: requires kind=dynamic or longrope$"),
        (lambda: RotaryScaling("dynamic", length=0), "^length=0: must be > 0 or None$"),
        (lambda: RotaryScaling("dynamic", 0.5), "^factor=0.5: must be ≥ 1 with kind=dynamic$"),
        (lambda: RotaryScaling("llama3", truncate=False), "^truncate=False: requires kind=yarn$"),
        (lambda: RotaryScaling("longrope"), r"^short_factors=\(\): is required by kind=longrope$"),
        (lambda: RotaryScaling(long_factors=(1.0,)), "^long_factors=.*: requires kind=longrope$"),
        (lambda: longrope((1.0, 2.0)), "^short_factors=.*: must be as many as long_factors$"),
        (lambda: longrope((0.0,)), r"^short_factors=\(0.0,\): must be > 0$"),
        (lambda: longrope((1.0,), original_length=1), "^original_length=1: must be > 1 with"),
        (
            lambda: RotaryConfig(scaling=longrope((1.0,))).check_channels(8),
            "^number of short_factors=1: must have 4, one for each pair",
        ),
        (
            lambda: RotaryConfig(scaling=RotaryScaling("dynamic")).check_channels(2),
            "^kind='dynamic': requires more than 2 channels",
        ),
        (lambda: RotaryConfig(base=1.0), "^base=1.0: must be > 1$"),
        (lambda: RotaryConfig(fraction=0.0), r"^fraction=0.0: must be in \(0, 1\]$"),
        (lambda: RotaryConfig(fraction=1.5), r"^fraction=1.5: must be in \(0, 1\]$"),
        (lambda: rotary(X[..., :7], NEAR), "^rotary.fraction=1.0: .* an even number ≥ 2 of"),
        (lambda: rotary(X, NEAR, fraction=0.1), "^rotary.fraction=0.1: .* not 0 of head_dim="),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
