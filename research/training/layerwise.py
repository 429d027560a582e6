"""Optimisers that change their moments on the way to the update and back, a layer at a time."""

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
    """``optimizer`` whose state rests as ``store`` leaves it, and is computed with as ``fetch``.

    Stacked layers are updated one after another and in place, so that what ``fetch`` makes is there
    of one layer alone. ``optimizer`` must treat layers alike and apart: no global norm.
    """

    def once(updates, state, params):
        found, state = optimizer.update(updates, fetch(state), params)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), found, updates), store(state)

    def update(updates, state, params=None):
        given = updates, state, params
        found, stacks = once(*given), _stacks(given)
        leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(stacks[0]), strict=True)
        layers = {a.shape[0] for a, is_one in leaves if is_one}
        if not layers:
            return found

        # XLA drops what is not asked for: of `found` the stacks, in the loop all else
        def layer(i, kept):
            cut = jax.tree.map(
                lambda a, is_one: jax.lax.dynamic_slice_in_dim(a, i, 1) if is_one else a,
                (*kept, params),
                stacks,
            )
            return jax.tree.map(
                lambda a, new, is_one: (
                    jax.lax.dynamic_update_slice_in_dim(a, new, i, 0) if is_one else a
                ),
                kept,
                once(*cut),
                stacks[:2],
            )

        (number,) = layers
        each = jax.lax.fori_loop(0, number, layer, given[:2])
        return jax.tree.map(lambda a, b, is_one: b if is_one else a, found, each, stacks[:2])

    return optax.GradientTransformation(lambda params: store(optimizer.init(params)), update)


def _stacks(tree: Any) -> Any:
    """The tree with True for arrays of stacked layers, unless a mesh splits the stack."""

    def is_stack(a, axes):
        split = (*jax.typeof(a).sharding.spec, None)[0]
        return bool(axes) and a.ndim > len(axes) and split is None

    return map_named(is_stack, tree)
