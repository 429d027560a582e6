"""The trained parameters, chosen by patterns over their paths; others have no gradients or moments.

A path is that of `layers.weights.flat`, e.g. ``blocks/0/mixer/query/weight``. In a pattern ``*``
matches any text, including ``/``.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

from layers.config import check
from layers.weights import flat

Tree = TypeVar("Tree")
ALL = ("*",)


def check_patterns(model: Any, patterns: Sequence[str]) -> None:
    """Raise `ConfigError` for a pattern that matches no parameter of ``model``."""
    check(len(patterns) > 0, "trainable", tuple(patterns), "must name at least one pattern")
    paths = list(flat(model))
    for pattern in patterns:
        matches = any(fnmatch.fnmatchcase(path, pattern) for path in paths)
        check(matches, "trainable", pattern, "matches no parameter of the model")


def split(model: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """``(trained, fixed)``: ``model`` twice, with None for the arrays that are in the other."""
    if tuple(patterns) == ALL:
        return model, jax.tree.map(lambda _: None, model)
    chosen = iter([any(fnmatch.fnmatchcase(path, p) for p in patterns) for path in flat(model)])
    mask = jax.tree.map(lambda _: next(chosen), model)
    return (
        jax.tree.map(lambda a, is_trained: a if is_trained else None, model, mask),
        jax.tree.map(lambda a, is_trained: None if is_trained else a, model, mask),
    )


def join(trained: Tree, fixed: Tree) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda a: a is None
    )
