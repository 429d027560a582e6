"""The loss of a model that reads keys and values from its cache, as it does when it generates.

One pass with a state gives the logits of decoding token by token, at the cost of a training pass:
the keys that a query sees are those that the cache returns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from layers.cache import KVCache
from layers.config import check, check_choice, check_types
from layers.decoder import Decoder, Output
from layers.hooks import Hooks
from layers.state import CONTIGUOUS, CacheConfig
from pallas_kernels.stored import Stored
from research.training import NextToken


def rounded(x: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """``x`` at the nearest of ``2**bits`` equidistant levels from its minimum to its maximum.

    Minimum and maximum are taken along ``axis`` (Liu 2024, KIVI, §3.1).
    """
    minimum = jnp.min(x, axis, keepdims=True)
    scale = (jnp.max(x, axis, keepdims=True) - minimum) / (2**bits - 1)
    return minimum + scale * jnp.round((x - minimum) / jnp.where(scale > 0, scale, 1))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Rounding of keys and values to ``bits`` bits, which no dtype of a cache has.

    ``keys``: a minimum and a scale for each ``"token"``, or for each ``"channel"`` of ``group``
    consecutive tokens (KIVI, §3.2); values always have them for each token. Tokens are rounded once
    all of their group is written, and are exact before, as KIVI's residual is.
    """

    bits: int
    keys: str = "token"
    group: int = 1

    def __post_init__(self):
        check_types(self)
        check(0 < self.bits <= 16, "bits", self.bits, "must be in [1, 16]")
        check_choice("keys", self.keys, ("token", "channel"))
        check(self.group > 0, "group", self.group, "must be > 0")
        one = "must be > 1 with keys='channel'"
        check(self.keys == "token" or self.group > 1, "group", self.group, one)

    def bytes_per_token(self, channels: int) -> float:
        """Bytes of a key and a value of ``channels`` channels: codes, and float32 scales.

        Those of the last group, while it is not complete, are more and are not counted.
        """
        codes, of_token = channels * self.bits / 8, 8
        of_key = of_token if self.keys == "token" else channels * 8 / self.group
        return 2 * codes + of_key + of_token


@dataclasses.dataclass(frozen=True)
class CachedNextToken(NextToken):
    """`NextToken` of a model that reads keys and values from a ``cache``; for evaluation.

    ``rounding``: they are also rounded. With groups, padding must come last in a row, and no layer
    may have a rolling cache.
    """

    cache: CacheConfig = CONTIGUOUS
    rounding: Rounding | None = None

    def __call__(self, model, batch, key=None, frozen=None):
        return super().__call__(functools.partial(self._cached, model), batch, key, frozen)

    def _cached(self, model: Decoder, tokens_bt, positions_bt, segment_ids_bt, key=None) -> Output:
        (b, t), rounding = tokens_bt.shape, self.rounding
        state = model.init_state(b, t, self.cache)
        hooks, group = None, t
        if rounding is not None and rounding.group == 1:
            edit = functools.partial(_edit, bits=rounding.bits)
            hooks = Hooks(edit={"attention.key": edit, "attention.value": edit})
        elif rounding is not None:
            group = rounding.group
        logits = []
        for start in range(0, t, group):
            some = slice(start, start + group)
            output = model(
                tokens_bt[:, some], positions_bt[:, some], segment_ids_bt[:, some], state,
                hooks, key,
            )  # fmt: skip
            logits.append(output.logits_btv)
            state = output.state
            if rounding is not None and group < t:
                state = _round_slots(state, rounding, some)
        return Output(jnp.concatenate(logits, axis=1), state, {}, None)


def _edit(x_btkc: jax.Array, layer: Any, *, bits: int) -> jax.Array:
    return rounded(x_btkc, bits)


def _round_slots(state: Any, rounding: Rounding, some: slice) -> Any:
    """A decoder's ``state`` in which one group, in the slots ``some``, is rounded."""

    def change(stored: Stored, axis: int) -> Stored:
        group = rounded(stored.codes[..., some, :], rounding.bits, axis)
        return dataclasses.replace(stored, codes=stored.codes.at[..., some, :].set(group))

    def of_layer(layer):
        if not isinstance(layer, KVCache):
            return layer
        floating = jnp.issubdtype(layer.keys.codes.dtype, jnp.floating) and not layer.rolling
        check(floating, "rounding.group", rounding.group, "requires contiguous floating caches")
        assert layer.values is not None
        keys = change(layer.keys, -1 if rounding.keys == "token" else -2)
        return dataclasses.replace(layer, keys=keys, values=change(layer.values, -1))

    return jax.tree.map(of_layer, state, is_leaf=lambda node: isinstance(node, KVCache))
