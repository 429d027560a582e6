"""States of layers between calls: registered dataclasses, passed in and returned.

Every state is a `LayerState`. A state of attention (`layers.cache`) also has
``extend(keys, values, positions, segments) -> (state, keys to see)``, which hides how keys are
stored. The functions here take the state of a decoder, or of one layer. `rewind`, `rollback`,
`cleared` and `with_table` also take stacked states (``scan=True``); those that select a row or a
page require an unstacked decoder's list of states (`layers.stack.unstacked`), whose arrays have the
batch, or the pages, as their first axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax

from layers.config import check, check_choice, check_types
from pallas_kernels.stored import DTYPES

KINDS = ("contiguous", "paged")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How attention layers store the keys and values of a decoder's state.

    ``kind``: ``"contiguous"``: each row has its slots, and those of sliding layers are rolling;
    ``"paged"``: rows have pages of ``page`` tokens in a pool of ``pages`` (None: enough for all
    rows). ``dtype``: of storage, one of `pallas_kernels.stored.DTYPES`; None: that of computation.
    """

    kind: str = "contiguous"
    dtype: str | None = None
    page: int = 16
    pages: int | None = None

    def __post_init__(self):
        check_types(self)
        check_choice("kind", self.kind, KINDS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        check(self.page > 0, "page", self.page, "must be > 0")
        check(self.pages is None or self.pages > 0, "pages", self.pages, "must be > 0 or None")
        for name, default in (("page", 16), ("pages", None)):
            value = getattr(self, name)
            allowed = self.kind == "paged" or value == default
            check(allowed, name, value, "changes nothing: requires kind='paged'")

    def dtype_for(self, channels: int, dtype: Any) -> str:
        """The dtype of storage of vectors of ``channels`` that are computed in ``dtype``.

        Raises:
          ConfigError: it does not support this number of channels.
        """
        stored = self.dtype or jax.numpy.dtype(dtype).name
        even = channels % 2 == 0
        check(
            even or stored != "int4",
            "cache.dtype",
            stored,
            f"requires even channels, not {channels}",
        )
        return stored


CONTIGUOUS = CacheConfig()


class LayerState:
    """The state of one layer; arrays have the batch as their first axis."""

    @property
    def can_rewind(self) -> bool:
        """Whether `rewind` is supported."""
        raise NotImplementedError

    def rewind(self, count_b: jax.Array) -> Self:
        """The state without the last ``count_b`` tokens of each row; else raises `ConfigError`."""
        raise NotImplementedError

    def cleared(self) -> Self:
        """The state without tokens. No number that it held reaches a later result, even NaN."""
        raise NotImplementedError

    @property
    def is_paged(self) -> bool:
        """Whether it has pages, so `with_table` and `copy_page` too (`layers.paged_cache`)."""
        return False

    def take_row(self, row: int | jax.Array) -> Self:
        """The state of one row, with a batch of 1."""
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1), self)

    def put_row(self, row: int | jax.Array, of_row: Self) -> Self:
        """The state with ``of_row``, of a batch of 1, as its ``row``."""
        return jax.tree.map(
            lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, row, 0), self, of_row
        )


def rewind(state: Any, count_b: jax.Array) -> Any:
    """A decoder's ``state`` without the last ``count_b`` tokens of each row.

    Raises:
      ConfigError: the state of a layer, which is named, does not support it.
    """
    return _map(lambda layer: layer.rewind(count_b), state)


def can_rewind(state: Any) -> bool:
    """Whether the states of all layers support `rewind`."""
    layers = jax.tree.leaves(state, is_leaf=_is_layer)
    return all(layer.can_rewind for layer in layers if _is_layer(layer))


def rollback(new: Any, old: Any, count_b: jax.Array) -> Any:
    """``new`` without its last ``count_b`` tokens, where layers support it; else ``old``.

    ``new`` follows ``old``. A recurrent layer and a rolling cache return to the whole of ``old``.
    So if ``can_rewind(new)`` is False, callers take back all tokens since ``old`` and repeat those
    that they keep.
    """
    return _map(
        lambda after, before: after.rewind(count_b) if after.can_rewind else before, new, old
    )


def cleared(state: Any) -> Any:
    """``state`` without tokens; nothing that it held reaches a later result, not even NaN."""
    return _map(lambda layer: layer.cleared(), state)


def take_row(state: Any, row: int | jax.Array) -> Any:
    """The state of one row, with a batch of 1; pages are not copied. ``row`` may be traced."""
    return _map(lambda layer: layer.take_row(row), state)


def put_row(state: Any, row: int | jax.Array, of_row: Any) -> Any:
    """``state`` with ``of_row``, from `take_row` and further calls, as its ``row``."""
    return _map(lambda layer, new: layer.put_row(row, new), state, of_row)


def copy_row(state: Any, source: int | jax.Array, target: int | jax.Array) -> Any:
    """``state`` with a copy of row ``source`` as its row ``target``; they share their pages."""
    return put_row(state, target, take_row(state, source))


def with_table(state: Any, table_bn: jax.Array) -> Any:
    """``state`` with another table of pages in all its paged caches.

    ``table_bn``: int32, the pages of each row in the order of its tokens; −1: no page. Rows keep
    their counts of tokens.

    Raises:
      ConfigError: no layer has pages, or the table has another shape than the present one.
    """
    layers = jax.tree.leaves(state, is_leaf=_is_layer)
    kinds = sorted({type(layer).__name__ for layer in layers})
    any_paged = any(layer.is_paged for layer in layers if _is_layer(layer))
    check(any_paged, "state", kinds, "has no pages: requires a cache with kind='paged'")
    return _map(lambda layer: layer.with_table(table_bn) if layer.is_paged else layer, state)


def copy_page(state: Any, source: int | jax.Array, target: int | jax.Array) -> Any:
    """``state`` with a copy of page ``source`` as page ``target`` in all its paged caches."""
    return _map(lambda layer: layer.copy_page(source, target) if layer.is_paged else layer, state)


def _is_layer(node: Any) -> bool:
    return isinstance(node, LayerState)


def _map(function: Callable, *states: Any) -> Any:
    return jax.tree.map(function, *states, is_leaf=_is_layer)
