"""Captures and edits of activations: ``tap(name, x)`` is the identity unless hooks are passed.

Hooks are an argument, not state. Layers call ``tap`` at the points of `NAMES`, and the decoder
returns the captures. `Hooks` is a pytree, so it may be an argument of a jitted function; its arrays
(positions, and arrays of edits) may change without a new compilation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial

from layers.config import check, check_choice

# name → the axis of time; "attention.weights" are [b, h, t, s], all others begin with [b, t]
NAMES = {
    "embedding": 1,  # what the first layer reads
    "residual": 1,  # what a block reads
    "residual.middle": 1,  # between a block's mixer and its feed-forward layer
    "mixer.input": 1,  # the mixer's input, normalised
    "attention.query": 1,
    "attention.key": 1,
    "attention.value": 1,
    "attention.weights": 2,
    "attention.output": 1,  # of each head, before the output projection
    "mixer.hidden": 1,  # of a recurrent mixer, before the output projection
    "mixer.output": 1,  # what the mixer adds to the residual, before a norm
    "mlp.input": 1,  # the feed-forward layer's input, normalised
    "mlp.hidden": 1,  # its hidden units, before the projection down
    "router.logits": 1,  # of a mixture of experts
    "experts.hidden": 1,  # hidden units of the chosen experts: [b, t, k, f]
    "mlp.output": 1,  # what the feed-forward layer adds to the residual, before a norm
    "final": 1,  # the last residual, normalised
}
OUTSIDE = {"embedding", "final"}  # of blocks
Layer = int | jax.Array
Edit = Callable[[jax.Array, Layer], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """One name to capture, at all layers and times or at some.

    ``layers``: the layers to capture, in this order; None: all that have the name. An unrolled
    stack stores only these; a scanned one first stacks all. ``positions``: int32 ``[p]``, indices
    along time (negative ones count from the end); None: all.
    """

    name: str = dataclasses.field(metadata=dict(static=True))
    layers: tuple[int, ...] | None = dataclasses.field(default=None, metadata=dict(static=True))
    positions: Any = None

    def __post_init__(self):
        check_choice("capture", self.name, NAMES)
        if self.layers is not None:
            check(len(self.layers) > 0, "capture.layers", self.layers, "must name at least one")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hooks:
    """What to capture and what to edit.

    ``capture``: names, or `Capture`s of some layers or positions. Captures inside blocks are
    stacked over layers. ``edit``: name → ``f(x, layer) -> x``; ``layer`` may be a traced int32 (if
    the stack is scanned or recomputed), so choose with ``jnp.where(layer == 3, …)``; it is −1
    outside blocks. An edit that has arrays is a `jax.tree_util.Partial` or another callable
    pytree; a plain function is static.

    Raises:
      ConfigError: a name that is not one of `NAMES`, or one that is captured twice.
    """

    capture: Sequence[Any] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        captures = tuple(Capture(c) if isinstance(c, str) else c for c in self.capture)
        names = [capture.name for capture in captures]
        check(len(set(names)) == len(names), "capture", names, "must name each at most once")
        for name in self.edit:
            check_choice("edit", name, NAMES)
        edits = {name: _as_pytree(edit) for name, edit in self.edit.items()}
        object.__setattr__(self, "capture", captures)
        object.__setattr__(self, "edit", edits)

    def captures(self, name: str) -> Capture | None:
        """The `Capture` of ``name``, or None."""
        matches = [c for c in self.capture if c.name == name]
        return matches[0] if matches else None


class Tap:
    """One layer's tap: applies edits and collects captures for the caller to return."""

    def __init__(self, hooks: Hooks | None = None, layer: Layer = -1, seen: set[str] | None = None):
        self._hooks = hooks or Hooks()
        self._layer = layer
        self._seen = set() if seen is None else seen  # names that were reached
        self.captured: dict[str, jax.Array] = {}

    def is_used(self, name: str) -> bool:
        """Whether ``name`` is captured or edited; if not, the caller need not compute it."""
        self._seen.add(name)
        return self._captures(name) is not None or name in self._hooks.edit

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        self._seen.add(name)
        if name in self._hooks.edit:
            x = self._hooks.edit[name](x, self._layer)
        if (capture := self._captures(name)) is not None:
            captured = x
            if capture.positions is not None:
                captured = jnp.take(x, jnp.asarray(capture.positions), axis=NAMES[name])
            self.captured[name] = captured
        # policies of `jax.checkpoint` use the same name
        return checkpoint_name(x, name)

    def _captures(self, name: str) -> Capture | None:
        """The `Capture` of ``name`` at this layer, or None; a traced layer is always captured."""
        capture = self._hooks.captures(name)
        inside = isinstance(self._layer, int) and self._layer >= 0
        if capture is None or not inside or capture.layers is None:
            return capture
        return capture if self._layer in capture.layers else None


def stacked(
    hooks: Hooks | None, captured: Mapping[str, Mapping[int, jax.Array]], seen: set[str]
) -> dict[str, jax.Array]:
    """Name → ``[layers, …]``, stacked from ``captured[name][layer]``.

    Raises:
      ConfigError: a name that no layer has (``seen``: the names that layers have), or a layer of a
        `Capture` that does not have it.
    """
    hooks, arrays = hooks or Hooks(), {}
    for kind, names in (("capture", [c.name for c in hooks.capture]), ("edit", hooks.edit)):
        for name in names:
            check(name in seen | OUTSIDE, kind, name, "no layer of this model has it")
    for capture in hooks.capture:
        name = capture.name
        if name in OUTSIDE:
            check(
                capture.layers is None,
                "capture.layers",
                capture.layers,
                f"must be None for {name!r}",
            )
            continue
        of_layer = captured.get(name, {})
        layers = sorted(of_layer) if capture.layers is None else capture.layers
        for layer in layers:
            allowed = f"the layers with {name!r} are {sorted(of_layer)}"
            check(layer in of_layer, "capture.layers", layer, allowed)
        arrays[name] = jnp.stack([of_layer[layer] for layer in layers])
    return arrays


def _as_pytree(edit: Any) -> Any:
    """``edit`` if it is a pytree already, else a `Partial` without arrays."""
    leaves = jax.tree.leaves(edit)
    return Partial(edit) if len(leaves) == 1 and leaves[0] is edit else edit
