"""Looking into and editing activations: ``tap(name, x)`` is the identity unless hooks are passed.

Hooks are an argument, not state: a layer receives ``tap`` and calls it at named places, and the
decoder returns what was captured. Names: ``embedding``, ``residual`` (a block's input),
``attention.query``, ``attention.key``, ``attention.value``, ``attention.weights``,
``attention.output``, ``mlp.output``, ``final`` (the normalised last residual).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

Layer = int | jax.Array
Edit = Callable[[jax.Array, Layer], jax.Array]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What to capture and what to change.

    ``capture``: names whose arrays come back, those inside blocks stacked over layers.
    ``edit``: name → ``f(x, layer) -> x``. ``layer`` is a Python int when the stack is unrolled and
    a traced int32 when it is scanned, so choose with ``jnp.where(layer == 3, …)``; −1 outside.
    """

    capture: tuple[str, ...] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)


class Tap:
    """One block's tap: applies edits and collects captures for the caller to return."""

    def __init__(self, hooks: Hooks | None = None, layer: Layer = -1):
        self._hooks = hooks or Hooks()
        self._layer = layer
        self.captured: dict[str, jax.Array] = {}

    def wants(self, name: str) -> bool:
        """Whether anything is captured or edited at ``name``: if not, it need not be computed."""
        return name in self._hooks.capture or name in self._hooks.edit

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        if name in self._hooks.edit:
            x = self._hooks.edit[name](x, self._layer)
        if name in self._hooks.capture:
            self.captured[name] = x
        return x
