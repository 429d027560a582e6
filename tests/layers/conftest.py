"""Fixtures every layer's tests share."""

import pytest
from flax import nnx


@pytest.fixture
def rngs():
    return nnx.Rngs(0)
