"""Optimisers whose moments are converted before and after the update, one layer at a time."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from layers.weights import map_named


def between(
    optimizer: optax.GradientTransformation,
    fetch: Callable[[Any], Any],
    store: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """``optimizer`` with ``fetch`` applied to its state before the update, and ``store`` after it.

    Stacked layers are updated one after another and in place, so that the result of ``fetch``
    exists for one layer at a time. ``optimizer`` must compute the update of each layer from that
    layer alone: no global norm.
    """

    def update_all(updates, state, params):
        updated, state = optimizer.update(updates, fetch(state), params)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), updated, updates), store(state)

    def update(updates, state, params=None):
        arguments = updates, state, params
        updated, stacks = update_all(*arguments), _stacks(arguments)
        leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(stacks[0]), strict=True)
        layers = {a.shape[0] for a, is_stack in leaves if is_stack}
        if not layers:
            return updated

        # XLA removes what is not used: the stacks of `updated`, and in the loop all other arrays
        def layer(i, current):
            one_layer = jax.tree.map(
                lambda a, is_stack: jax.lax.dynamic_slice_in_dim(a, i, 1) if is_stack else a,
                (*current, params),
                stacks,
            )
            return jax.tree.map(
                lambda a, new, is_stack: (
                    jax.lax.dynamic_update_slice_in_dim(a, new, i, 0) if is_stack else a
                ),
                current,
                update_all(*one_layer),
                stacks[:2],
            )

        (number,) = layers
        layers_updated = jax.lax.fori_loop(0, number, layer, arguments[:2])
        return jax.tree.map(
            lambda a, b, is_stack: b if is_stack else a, updated, layers_updated, stacks[:2]
        )

    return optax.GradientTransformation(lambda params: store(optimizer.init(params)), update)


def _stacks(tree: Any) -> Any:
    """The tree with True for arrays of stacked layers, unless the stack is sharded."""

    def is_stack(a, axes):
        sharded_over = (*jax.typeof(a).sharding.spec, None)[0]
        return bool(axes) and a.ndim > len(axes) and sharded_over is None

    return map_named(is_stack, tree)
