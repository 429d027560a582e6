"""A run's state on disk: checkpoints of what is trained, and once what is not.

A decoder's layers are saved as they are, stacked or a list (`layers.stack`); a run that goes on
with the other layout gets them rearranged.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.stack import rearranged
from research.training import trainable
from research.training.checkpoint import Checkpoints
from research.training.state import TrainState

FIXED = "fixed"  # the folder of what is not trained, beside the checkpoints


class SavedState:
    """The checkpoints of the run in ``workdir``, which trains what ``patterns`` name.

    ``model`` is the configuration to restore; ``abstract(model)`` is the state of one as
    `jax.ShapeDtypeStruct` with the shardings to restore it in.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        model: Any,
        abstract: Callable[[Any], TrainState],
        patterns: tuple[str, ...] = trainable.ALL,
    ):
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep)
        self._workdir, self._model, self._patterns = workdir, model, patterns
        self._abstract = abstract

    def save(
        self, step: int, state: TrainState, position: Mapping[str, Any], loss: float | None
    ) -> None:
        """Begin to save; see `Checkpoints.save`."""
        trained, _ = trainable.split(state.model, self._patterns)
        position = {**position, "layout": _layout(self._model)}
        self.checkpoints.save(step, dataclasses.replace(state, model=trained), position, loss)

    def keep_fixed(self, state: TrainState) -> None:
        """Save what is not trained, where something is not: once, as the run begins."""
        _, fixed = trainable.split(state.model, self._patterns)
        if jax.tree.leaves(fixed):
            checkpoints = Checkpoints(self._workdir / FIXED, keep=1)
            try:
                checkpoints.save(0, {"model": fixed}, {"layout": _layout(self._model)}, None)
            finally:
                checkpoints.close()

    def restore(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and position, or None if there is none; see `Checkpoints.restore`."""

        def trained(config: Any) -> TrainState:
            state = self._abstract(config)
            return dataclasses.replace(state, model=trainable.split(state.model, self._patterns)[0])

        def fixed(config: Any) -> dict[str, Any]:
            return {"model": trainable.split(self._abstract(config).model, self._patterns)[1]}

        found = self._restored(self.checkpoints, trained)
        if found is None:
            return None
        state, position = found
        if jax.tree.leaves(fixed(self._model)):
            held = Checkpoints(self._workdir / FIXED, keep=1)
            try:
                rest = self._restored(held, fixed)
            finally:
                held.close()
            if rest is None:
                folder = str(self._workdir / FIXED)
                raise ConfigError(f"workdir={folder!r}: what is not trained is missing")
            model = trainable.join(state.model, rest[0]["model"])
            state = dataclasses.replace(state, model=model)
        return state, position

    def close(self) -> None:
        """Wait for saves under way; see `Checkpoints.close`."""
        self.checkpoints.close()

    def _restored(self, checkpoints: Checkpoints, abstract: Callable[[Any], Any]):
        """The newest tree of ``checkpoints`` in the layout of ``model``, and its position."""

        def as_held(position: Mapping[str, Any]) -> Any:
            return abstract(_with_layout(self._model, position.get("layout")))

        found = checkpoints.restore(as_held)
        if found is None or found[1].get("layout") in (None, _layout(self._model)):
            return found
        tree, position = found
        wanted = abstract(self._model)
        layout: Any = _layout(self._model)
        stored = jax.tree.map(lambda a: a.sharding, wanted)
        return jax.jit(lambda t: rearranged(t, **layout), out_shardings=stored)(tree), position


def _layout(model: Any) -> dict[str, Any] | None:
    """How the layers of ``model`` are laid out in memory: fields of a `DecoderConfig`."""
    if not isinstance(model, DecoderConfig):
        return None
    return {"scan": model.scan, "circuits": model.circuits}


def _with_layout(model: Any, layout: Mapping[str, Any] | None) -> Any:
    return model if layout is None else dataclasses.replace(model, **layout)
