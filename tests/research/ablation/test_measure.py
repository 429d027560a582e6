"""Measurements on operations whose numbers are known."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from layers.mlp import MlpConfig
from layers.state import CacheConfig
from research.ablation.attention_op import AttentionOp
from research.ablation.measure import growth, median_times, state_bytes, temporary_bytes


def test_growth_is_the_power():
    sizes = (10, 20, 40)
    assert growth(sizes, [3 * n**2 for n in sizes]) == pytest.approx(2)
    assert growth(sizes, [7.0] * 3) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError, match="^values=.*must be > 0"):
        growth(sizes, [0, 1, 2])


@pytest.mark.parametrize(
    ("cache", "vector"),
    [
        (CacheConfig(), 4 * 8),
        (CacheConfig(dtype="bfloat16"), 2 * 8),
        (CacheConfig(dtype="int8"), 8 + 4),
        (CacheConfig("paged", page=4, dtype="float8_e4m3fn"), 8 + 4),
        (CacheConfig("paged", page=4, dtype="int4"), 8 // 2 + 4 + 4),
    ],
)
def test_a_state_is_its_vectors_codes_and_scales(cache, vector):
    """Not positions, segments and tables; the recurrent layer's state does not depend on it."""
    model = Decoder(
        DecoderConfig(
            11, 16, 2, attention=AttentionConfig(2), mlp=MlpConfig(8), mamba=MambaConfig(state=3),
            pattern=("attention", "mamba"), feed_forward=("mlp", "none"), position="none",
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    recurrent = 32 * (3 + 3) * 4  # of 32 channels: the convolution's inputs, and the scan
    assert state_bytes(model, 2, 8, cache) == 2 * (8 * 2 * 2 * vector + recurrent)


def test_turns_alternate_and_the_first_is_not_counted(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def takes(name, *seconds):
        left = iter(seconds)

        def run():
            calls.append(name)
            now[0] += next(left)

        return run

    assert median_times([takes("a", 90, 1, 2, 9), takes("b", 80, 5, 5, 5)], 3) == [2, 5]
    assert "".join(calls) == "abababab"


def test_temporary_bytes_are_those_of_the_square():
    def through_a_square(x):
        square = jnp.exp(x[:, None] * x[None, :])
        return square @ square @ x

    shape = jax.ShapeDtypeStruct((512,), jnp.float32)
    found = temporary_bytes(jax.jit(through_a_square).lower(shape).compile())
    assert 4 * 512**2 <= found <= 3 * 4 * 512**2


def test_the_op_is_held_against_float64():
    coarse = AttentionOp(2, 16, "bfloat16", "reference").errors(64, seed=0)
    fine = AttentionOp(2, 16, "float32", "reference").errors(64, seed=0)
    flash = AttentionOp(2, 16, "float32").errors(64, seed=0)
    for name in ("error", "gradient_error"):
        assert 1e-4 < coarse[name] < 5e-2
        assert 0 < fine[name] < 2e-6 and 0 < flash[name] < 2e-6


def test_the_ops_memory_is_the_square_only_when_scores_are_stored():
    lengths = (1024, 2048, 4096)
    assert growth(lengths, AttentionOp(2, 16, "float32", "reference").memory(lengths)) > 1.9
    assert growth(lengths, AttentionOp(2, 16, "float32").memory(lengths)) < 1.25


@pytest.mark.tpu_compile
def test_the_ops_memory_on_a_chip_that_is_not_here():
    [naive] = AttentionOp(2, 64, "bfloat16", "reference").tpu_memory([8192], "v5e:2x2")
    [flash] = AttentionOp(2, 64, "bfloat16").tpu_memory([8192], "v5e:2x2")
    assert naive > 2 * 8192**2 * 2 and 20 * flash < naive


def test_the_same_op_is_as_fast_as_itself():
    op = AttentionOp(1, 8, "float32", "reference")
    assert math.isfinite(op.speedup(op, 16, rounds=3, seed=0))


def test_a_size_that_cannot_be():
    with pytest.raises(ConfigError, match="^heads=0: must be > 0"):
        AttentionOp(0, 8, "float32")
