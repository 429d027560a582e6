"""Taps by themselves; through the stack they are tested with the decoder."""

import jax.numpy as jnp
import pytest

from layers.config import ConfigError
from layers.hooks import Hooks, Tap


def test_a_tap_without_hooks_is_the_identity():
    tap, x = Tap(), jnp.ones(3)
    assert tap("residual", x) is x
    assert not tap.captured and not tap.wants("residual")


def test_edits_come_before_captures_and_know_their_layer():
    hooks = Hooks(capture=("residual",), edit={"residual": lambda x, layer: x * layer})
    tap = Tap(hooks, 3)
    assert tap.wants("residual") and not tap.wants("final")
    assert float(tap("residual", jnp.ones(()))) == 3
    assert float(tap.captured["residual"]) == 3


def test_a_misspelt_name_is_refused():
    with pytest.raises(ConfigError, match=r"^capture='residul': .*did you mean 'residual'\?\)$"):
        Hooks(capture=("residul",))
    with pytest.raises(ConfigError, match="^edit='mlp': must be one of embedding, residual"):
        Hooks(edit={"mlp": lambda x, layer: x})
