"""Looking into and editing activations: ``tap(name, x)`` is the identity unless hooks are passed.

Hooks are an argument, not state: a layer receives ``tap`` and calls it at named places, and the
decoder returns what was captured. The places are `NAMES`; ``residual`` is a block's input,
``mixer.output`` what a recurrent mixer gives to its output projection, and ``final`` the normalised
last residual.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jax.ad_checkpoint import checkpoint_name

from layers.config import check_choice

NAMES = (
    "embedding",
    "residual",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.weights",
    "attention.output",
    "mixer.output",
    "mlp.output",
    "final",
)
Layer = int | jax.Array
Edit = Callable[[jax.Array, Layer], jax.Array]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What to capture and what to change.

    ``capture``: names whose arrays come back, those inside blocks stacked over layers.
    ``edit``: name → ``f(x, layer) -> x``. ``layer`` may be a traced int32 (it is when the stack is
    scanned or recomputed), so choose with ``jnp.where(layer == 3, …)``; −1 outside blocks.

    Raises:
      ConfigError: a name that is not one of `NAMES`, which would see and change nothing.
    """

    capture: tuple[str, ...] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in self.capture:
            check_choice("capture", name, NAMES)
        for name in self.edit:
            check_choice("edit", name, NAMES)


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
        # policies of `jax.checkpoint` know it by the same name
        return checkpoint_name(x, name)
