"""What every layer's tests share."""

import jax
import pytest
from flax import nnx


@pytest.fixture(autouse=True, scope="package")
def quick_compiles():
    """These tests compile much and compute little; LLVM's optimisations would be half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def rngs():
    return nnx.Rngs(0)
