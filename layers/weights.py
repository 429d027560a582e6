"""Reads of parameters and products with them, for parameters that hold an array or a `Leaf`.

A layer declares ``nnx.Param(array, axes=…, role=…)``, with a logical axis for each dimension and a
role if it is a matrix (`layers.roles`), and uses it by `read`, `einsum` and `lookup` only. These
cast it, and all-gather it over ``fsdp``. A tree rewrite may put a `Leaf` in the place of the array
(quantised codes, a low-rank sum) without a change of the layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from layers.roles import Role
from layers.sharding import (
    ROWS,
    Axes,
    Scattered,
    axes_of,
    broadcast_to,
    gather,
    named_axes,
    reshard,
    spec,
)
from layers.weight_gradient import product

Tree = TypeVar("Tree")


class Leaf:
    """A small pytree in the place of a parameter's array.

    A subclass is a frozen dataclass, registered as a pytree, whose static field ``axes`` names the
    dimensions of the array that it replaces. Its arrays may have further dimensions before these:
    stacked layers.
    """

    axes: Axes

    def parts(self) -> Mapping[str, Axes]:
        """Each field that holds an array → the logical axes of its last dimensions."""
        raise NotImplementedError

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The array that it replaces, of one layer, in ``dtype``."""
        raise NotImplementedError

    def read(self, dtype: jnp.dtype) -> jax.Array:
        """`dense` of all-gathered parts."""
        return self._gathered().dense(dtype)

    def einsum(
        self, subscripts: str, x: jax.Array, *, dtype: jnp.dtype, out_axes: Axes, out_dtype: Any
    ) -> jax.Array:
        """``jnp.einsum(subscripts, x, dense)``; override it to multiply by the parts."""
        weight = self.read(dtype)
        return _multiply(subscripts, x, weight, self.axes, dtype, out_axes, out_dtype)

    def lookup(self, ids_bt: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of `dense`; override it to decode only these rows."""
        return _rows(self.read(dtype), ids_bt)

    def _gathered(self) -> "Leaf":
        parts = {n: gather(getattr(self, n)[...], axes) for n, axes in self.parts().items()}
        return dataclasses.replace(self, **parts)  # type: ignore[type-var]


_NODES = (Leaf, Scattered)


def read(
    param: nnx.Variable, dtype: jnp.dtype, *, like: jax.Array | None = None, deferred: bool = False
) -> jax.Array:
    """The array of ``param`` in ``dtype``, in its computed sharding.

    Args:
      like: the result is an array that broadcasts with ``like``, along its last dimensions.
      deferred: True if only products and `layers.sharding.per_device` use the result. With ``like``
        or ``deferred`` the gradient may stay unreduced, for a later sum over rows.
    """
    value = param.get_value()
    if isinstance(value, Leaf):
        return value.read(dtype)
    rows = ROWS if deferred or like is not None else None
    array = gather(jnp.asarray(value[...], dtype), param.axes, rows=rows)
    return array if like is None else broadcast_to(array, like)


def einsum(
    subscripts: str,
    x: jax.Array,
    param: nnx.Variable,
    *,
    dtype: jnp.dtype,
    out_axes: Axes,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """``jnp.einsum(subscripts, x, param)`` in ``dtype``.

    Args:
      subscripts: two operands, e.g. ``"btd,dhc->bthc"``.
      x: activations, cast to ``dtype``.
      out_axes: logical axes of the result.
      out_dtype: dtype of accumulation and of the result (for logits, float32).
    """
    value = param.get_value()
    if isinstance(value, Leaf):
        options: dict[str, Any] = dict(dtype=dtype, out_axes=out_axes, out_dtype=out_dtype)
        return value.einsum(subscripts, x, **options)
    weight = jnp.asarray(value[...], dtype)
    return _multiply(subscripts, x, weight, param.axes, dtype, out_axes, out_dtype)


def lookup(param: nnx.Variable, ids_bt: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows ``[b, t, d]`` of a table in ``dtype``; an id out of range gives NaN."""
    value = param.get_value()
    if isinstance(value, Leaf):
        return value.lookup(ids_bt, dtype)
    return _rows(gather(value[...], param.axes, rows=ROWS).astype(dtype), ids_bt)


def _multiply(subscripts, x, weight, weight_axes, dtype, out_axes, out_dtype) -> jax.Array:
    inputs, output = subscripts.split("->")
    x_letters, weight_letters = inputs.split(",")
    named = dict(zip(weight_letters, weight_axes, strict=True))
    named |= dict(zip(output, out_axes, strict=True))
    rows = tuple(named[letter] for letter in output if letter not in weight_letters)
    x = reshard(x.astype(dtype), *(named[letter] for letter in x_letters))
    weight = gather(weight, weight_axes, rows=rows)
    if (out_sharding := spec(*out_axes)) is None:
        return product(subscripts, x, weight, preferred_element_type=out_dtype)
    return jnp.einsum(
        subscripts, x, weight, preferred_element_type=out_dtype, out_sharding=out_sharding
    )


def _rows(table_vd: jax.Array, ids_bt: jax.Array) -> jax.Array:
    return table_vd.at[ids_bt].get(
        mode="fill",
        fill_value=jnp.nan,
        wrap_negative_indices=False,
        out_sharding=spec("batch", "time", None),
    )


class Declared(NamedTuple):
    """What a parameter's declaration says of an array."""

    axes: Axes  # of its last dimensions; () for arrays outside variables
    role: Role | None


def map_named(function: Callable[..., Any], tree: Tree, *trees: Any) -> Tree:
    """`map_declared` with ``function(array, axes, …)``."""
    return map_declared(lambda a, declared, *rest: function(a, declared.axes, *rest), tree, *trees)


def map_declared(function: Callable[..., Any], tree: Tree, *trees: Any) -> Tree:
    """``tree`` with ``function(array, declared, …)`` of each array; ``declared``: a `Declared`.

    Arrays of a `Leaf` have the axes of `Leaf.parts`, and the variable's role if these are the
    variable's axes. Those of another pytree in a variable (an optimiser's codes and scales) have
    what the variable declares. ``trees``: further trees of the same structure, or with subtrees in
    the place of arrays.
    """

    def of_value(value: Any, declared: Declared, *others: Any) -> Any:
        def of_node(node: Any, *others: Any) -> Any:
            if not isinstance(node, Leaf):
                return function(node, declared, *others)
            parts = {}
            for name, axes in node.parts().items():
                role = declared.role if axes == declared.axes else None
                each = (getattr(o, name) for o in others)
                parts[name] = of_value(getattr(node, name), Declared(axes, role), *each)
            return dataclasses.replace(node, **parts)  # type: ignore[type-var]

        return jax.tree.map(of_node, value, *others, is_leaf=lambda a: isinstance(a, _NODES))

    def of_variable(variable: Any, *others: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return function(variable, Declared((), None), *others)
        metadata = variable.get_metadata()
        declared = Declared(metadata.get("axes", ()), metadata.get("role"))
        others = tuple(o.get_value() for o in others)
        return variable.replace(of_value(variable.get_value(), declared, *others))

    return jax.tree.map(of_variable, tree, *trees, is_leaf=lambda a: isinstance(a, nnx.Variable))


def flat(tree: Any) -> dict[str, jax.Array]:
    """Path → array, e.g. ``blocks/0/mixer/query/weight``, in the order of the tree's leaves.

    The path of an array of a `Leaf` ends in the name of its field.
    """
    arrays = {}
    flatten, to_name = jax.tree_util.tree_flatten_with_path, jax.tree_util.keystr
    for path, node in flatten(tree, is_leaf=lambda a: isinstance(a, nnx.Variable))[0]:
        value = node.get_value() if isinstance(node, nnx.Variable) else node
        for inner, leaf in flatten(value)[0]:
            arrays[to_name((*path, *inner), simple=True, separator="/")] = leaf
    return arrays


def gathers(tree: Any) -> bool:
    """Whether a parameter of ``tree`` is stored sharded over an axis that `read` all-gathers."""
    gathered = []

    def collect(array, axes):
        target = spec(*axes)
        stored = array.whole if isinstance(array, Scattered) else array
        if axes and target is not None:
            gathered.append(named_axes(axes_of(stored)) - named_axes(target))

    map_named(collect, tree)
    return any(gathered)


def dense(tree: Tree, dtype: jnp.dtype) -> Tree:
    """``tree`` with every `Leaf` replaced by its dense array, in ``dtype``."""

    def of_leaf(leaf: Leaf) -> jax.Array:
        name, axes = next(iter(leaf.parts().items()))
        run: Callable = lambda layer_leaf: layer_leaf.dense(dtype)  # noqa: E731
        for _ in range(getattr(leaf, name).ndim - len(axes)):  # stacked layers
            run = jax.vmap(run)
        return run(leaf)

    def of_variable(variable: Any) -> Any:
        has_leaf = isinstance(variable, nnx.Variable) and isinstance(variable.get_value(), Leaf)
        return variable.replace(of_leaf(variable.get_value())) if has_leaf else variable

    return jax.tree.map(of_variable, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
