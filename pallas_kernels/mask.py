"""`Mask`: who sees whom in attention, for layers, kernels, meshes and caches."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import check, check_array


class Rule(Protocol):
    """The static part of a mask."""

    @property
    def causal(self) -> bool: ...

    @property
    def window(self) -> int | None: ...


def sees(rule: Rule, q_at, k_at, q_in=None, k_in=None, until=None) -> jax.Array:
    """Whether each query sees each key, by the rules of `Mask`; all arrays broadcast.

    ``q_at``, ``k_at``: positions. ``q_in``, ``k_in``: segments, None if the mask has none;
    ``until`` likewise.
    """
    distance = q_at - k_at
    seen = jnp.broadcast_to(k_at >= 0, distance.shape)
    if rule.causal and until is None:
        seen &= distance >= 0  # q ≥ k ≥ 0
    elif rule.causal:
        seen &= ((distance >= 0) | (k_at <= until)) & (q_at >= 0)
    else:
        seen &= q_at >= 0
    if rule.window is not None:
        seen &= jnp.abs(distance) < rule.window
    if q_in is not None:
        seen &= q_in == k_in
    return seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees. A query sees a key when all of these hold:

    - both positions are ≥ 0: −1 is padding, which sees nothing and is seen by nobody;
    - both are in the same segment, if there are segments;
    - ``causal``: ``k_position ≤ max(q_position, until)``;
    - ``window``: ``|q_position − k_position| < window``.

    Positions and segments are int32: one row for all, or one for each row of the batch. Positions
    default to ``0, 1, 2, …``. ``until_bt`` is the last position that a query sees beyond its own:
    the end of its prefix (prefix-LM) or of its image; None: its own position. A window is centred
    on the query's own position. ``causal`` and ``window`` are static.
    """

    q_positions_bt: Any = None
    k_positions_bs: Any = None
    q_segments_bt: Any = None
    k_segments_bs: Any = None
    until_bt: Any = None
    causal: bool = dataclasses.field(default=True, metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def of_tokens(cls, positions_bt=None, segments_bt=None, until_bt=None, **static: Any) -> "Mask":
        """The mask of self-attention, where queries and keys are the same tokens."""
        return cls(positions_bt, positions_bt, segments_bt, segments_bt, until_bt, **static)

    def with_segments(self, b: int, t: int) -> "Mask":
        """The mask with positions and segments of queries as ``[b, t]``; segments default to 0."""
        q_at, _ = self._positions(t, t)
        q_in = jnp.zeros((1, t), jnp.int32) if self.q_segments_bt is None else self.q_segments_bt
        q_at, q_in = (jnp.broadcast_to(a, (b, t)) for a in (q_at, q_in))
        return dataclasses.replace(self, q_positions_bt=q_at, q_segments_bt=q_in)

    def with_keys(self, positions_bs, segments_bs) -> "Mask":
        """The mask with the same queries and other keys."""
        return dataclasses.replace(self, k_positions_bs=positions_bs, k_segments_bs=segments_bs)

    def sides(self, q: Any, k: Any) -> "Mask":
        """The mask with ``q`` in the place of each array of queries, and ``k`` of keys."""
        arrays = dict(
            q_positions_bt=q, k_positions_bs=k, q_segments_bt=q, k_segments_bs=k, until_bt=q
        )
        present = {name: a for name, a in arrays.items() if getattr(self, name) is not None}
        return dataclasses.replace(self, **present)

    def visible(self, t: int, s: int) -> jax.Array:
        """The mask as bool ``[b, t, s]``, or ``[1, t, s]`` if all rows have the same."""
        q_at, k_at = self._positions(t, s)
        return sees(
            self,
            q_at[:, :, None],
            k_at[:, None, :],
            None if self.q_segments_bt is None else self.q_segments_bt[:, :, None],
            None if self.k_segments_bs is None else self.k_segments_bs[:, None, :],
            None if self.until_bt is None else self.until_bt[:, :, None],
        )

    def distance(self, t: int, s: int) -> jax.Array:
        """``|q_position − k_position|``, ``[b, t, s]`` or ``[1, t, s]``."""
        q_at, k_at = self._positions(t, s)
        return jnp.abs(q_at[:, :, None] - k_at[:, None, :])

    def _positions(self, t: int, s: int) -> tuple[Any, Any]:
        q_at, k_at = self.q_positions_bt, self.k_positions_bs
        return (
            jnp.arange(t)[None] if q_at is None else q_at,
            jnp.arange(s)[None] if k_at is None else k_at,
        )

    def whole(self, b: int, t: int, s: int) -> "Mask":
        """The mask with positions, and with all arrays ``[b, t]`` or ``[b, s]``; checked.

        Raises:
          ValueError: names the field of a wrong shape, dtype or value.
        """
        check(self.window is None or self.window > 0, "window", self.window, "must be > 0")
        check(
            (self.q_segments_bt is None) == (self.k_segments_bs is None),
            "segments",
            "one of two",
            "queries and keys must both have segments, or neither",
        )
        check(
            self.causal or self.until_bt is None,
            "until",
            "given",
            "changes nothing: requires causal=True",
        )

        def rows(name: str, array, length: int):
            batch = array.shape[0] if array.ndim == 2 and array.shape[0] == 1 else b
            check_array(name, array, (batch, length), "integer")
            return jnp.broadcast_to(array.astype(jnp.int32), (b, length))

        def positions(name: str, array, length: int):
            return rows(name, jnp.arange(length)[None] if array is None else array, length)

        def segments(name: str, array, length: int):
            return None if array is None else rows(name, array, length)

        return dataclasses.replace(
            self,
            q_positions_bt=positions("q_positions", self.q_positions_bt, t),
            k_positions_bs=positions("k_positions", self.k_positions_bs, s),
            q_segments_bt=segments("q_segments", self.q_segments_bt, t),
            k_segments_bs=segments("k_segments", self.k_segments_bs, s),
            until_bt=segments("until", self.until_bt, t),
        )

    def padded(self, t: int, s: int) -> "Mask":
        """A `whole` mask with padding up to ``t`` queries and ``s`` keys, and with segments."""

        def lengthen(a, length: int, value: int):
            return jnp.pad(a, ((0, 0), (0, length - a.shape[1])), constant_values=value)

        q, k = self.q_positions_bt, self.k_positions_bs
        q_in = jnp.zeros_like(q) if self.q_segments_bt is None else self.q_segments_bt
        k_in = jnp.zeros_like(k) if self.k_segments_bs is None else self.k_segments_bs
        return dataclasses.replace(
            self,
            q_positions_bt=lengthen(q, t, -1),
            k_positions_bs=lengthen(k, s, -1),
            q_segments_bt=lengthen(q_in, t, 0),
            k_segments_bs=lengthen(k_in, s, 0),
            until_bt=None if self.until_bt is None else lengthen(self.until_bt, t, -1),
        )

    def arrays(self) -> list[tuple[str, Any]]:
        """The arrays that are not None, each with its side: ``"q"`` or ``"k"``."""
        named = zip("qkqkq", jax.tree.leaves(self, is_leaf=lambda a: a is None), strict=True)
        return [(side, a) for side, a in named if a is not None]


CAUSAL = Mask()  # over positions 0, 1, 2, …
