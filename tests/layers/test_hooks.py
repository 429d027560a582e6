"""Taps by themselves; through the stack they are tested with the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from layers.config import ConfigError
from layers.hooks import NAMES, Capture, Hooks, Tap, stacked


def test_a_tap_without_hooks_is_the_identity():
    tap, x = Tap(), jnp.ones(3)
    assert tap("residual", x) is x
    assert not tap.captured and not tap.is_used("residual")


def test_edits_come_before_captures_and_know_their_layer():
    hooks = Hooks(capture=("residual",), edit={"residual": lambda x, layer: x * layer})
    tap = Tap(hooks, 3)
    assert tap.is_used("residual") and not tap.is_used("final")
    assert float(tap("residual", jnp.ones(()))) == 3
    assert float(tap.captured["residual"]) == 3


def test_a_misspelt_name_is_refused():
    with pytest.raises(ConfigError, match=r"^capture='residul': .*did you mean 'residual'\?\)$"):
        Hooks(capture=("residul",))
    with pytest.raises(ConfigError, match="^edit='mlp': must be one of embedding, residual"):
        Hooks(edit={"mlp": lambda x, layer: x})
    with pytest.raises(ConfigError, match=r"^capture=\['final', 'final'\]: must name each at most"):
        Hooks(capture=("final", Capture("final")))
    with pytest.raises(ConfigError, match=r"^capture.layers=\(\): must name at least one"):
        Capture("residual", layers=())


def test_a_capture_chooses_positions_along_time():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for name, axis in NAMES.items():
        a = jnp.moveaxis(x, 1, axis) if axis == 1 else x[:, None]
        tap = Tap(Hooks(capture=(Capture(name, positions=jnp.array([-1, 0])),)))
        assert tap(name, a) is not None
        np.testing.assert_array_equal(tap.captured[name], jnp.take(a, jnp.array([2, 0]), axis))


def test_a_layer_that_is_not_chosen_is_not_kept():
    hooks = Hooks(capture=(Capture("residual", layers=(1,)),), edit={"final": lambda x, _: x})
    kept = [Tap(hooks, layer) for layer in range(3)]
    for tap in kept:
        tap("residual", jnp.ones(()))
    assert [bool(tap.captured) for tap in kept] == [False, True, False]
    assert [tap.is_used("residual") for tap in kept] == [False, True, False]
    seen = {"residual"}
    assert stacked(hooks, {"residual": {1: jnp.ones(2)}}, seen)["residual"].shape == (1, 2)
    with pytest.raises(ConfigError, match=r"^capture.layers=1: .* 'residual' are \[0, 2\]$"):
        stacked(hooks, {"residual": {0: jnp.ones(2), 2: jnp.ones(2)}}, seen)
    with pytest.raises(ConfigError, match="^capture='residual': no layer of this model has it"):
        stacked(hooks, {}, set())
    with pytest.raises(ConfigError, match=r"^capture.layers=\(1,\): must be None for 'final'"):
        stacked(Hooks((Capture("final", layers=(1,)),)), {}, seen)


def test_they_are_an_argument_of_a_compiled_function():
    """Positions and what an edit carries change without a new compilation."""
    traced = []

    @jax.jit
    def run(x, hooks):
        traced.append(None)
        tap = Tap(hooks, 2)
        return tap("residual", x), tap.captured["residual"]

    def add(vector, x, layer):
        return x + vector * layer

    x = jnp.zeros((1, 3, 2))
    for vector, at in ((1.0, 0), (3.0, 2)):
        hooks = Hooks(
            capture=(Capture("residual", positions=jnp.array([at])),),
            edit={"residual": Partial(add, jnp.array([0.0, vector]))},
        )
        y, kept = run(x, hooks)
        np.testing.assert_array_equal(y[0], [[0, 2 * vector]] * 3)
        assert kept.shape == (1, 1, 2)
    assert len(traced) == 1
    gradient = jax.grad(lambda h: run(x, h)[0].sum(), allow_int=True)(hooks)
    np.testing.assert_array_equal(gradient.edit["residual"].args[0], [6.0, 6.0])
