"""The state of a run on disk: checkpoints of the trained parameters, and one save of the others.

The layers of a decoder are saved as they are, stacked or as a list (`layers.stack`). A run that
resumes with the other layout gets them rearranged.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.stack import rearranged
from research.parallel.processes import barrier
from research.training import trainable
from research.training.checkpoint import Checkpoints
from research.training.state import TrainState

FIXED = "fixed"  # the folder of the parameters that are not trained, beside the checkpoints


class SavedState:
    """The checkpoints of the run in ``workdir``, which trains the parameters of ``patterns``.

    ``model`` is the configuration to restore; ``abstract(model)`` is its state as
    `jax.ShapeDtypeStruct` with the shardings to restore to.
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
        """Save the parameters that are not trained, if any; called once, at the start of a run."""
        _, fixed = trainable.split(state.model, self._patterns)
        if jax.tree.leaves(fixed):
            # of a start that ended before its first checkpoint, maybe with another ``init``
            if jax.process_index() == 0:
                shutil.rmtree(self._workdir / FIXED, ignore_errors=True)
            barrier()
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

        restored = self._restore_with_layout(self.checkpoints, trained)
        if restored is None:
            return None
        state, position = restored
        return dataclasses.replace(state, model=self._with_fixed(state.model)), position

    def restore_model(self) -> Any:
        """The newest model, or None if there is none; moments are not read."""

        def trained(config: Any) -> dict[str, Any]:
            return {"model": trainable.split(self._abstract(config).model, self._patterns)[0]}

        restored = self._restore_with_layout(self.checkpoints, trained, partial=True)
        return None if restored is None else self._with_fixed(restored[0]["model"])

    def _with_fixed(self, model: Any) -> Any:
        """The trained parameters ``model`` together with those that are not trained."""

        def fixed(config: Any) -> dict[str, Any]:
            return {"model": trainable.split(self._abstract(config).model, self._patterns)[1]}

        if not jax.tree.leaves(fixed(self._model)):
            return model
        checkpoints = Checkpoints(self._workdir / FIXED, keep=1)
        try:
            restored = self._restore_with_layout(checkpoints, fixed, partial=True)
        finally:
            checkpoints.close()
        if restored is None:
            folder = str(self._workdir / FIXED)
            raise ConfigError(
                f"workdir={folder!r}: the parameters that are not trained are missing"
            )
        return trainable.join(model, restored[0]["model"])

    def close(self) -> None:
        """Wait for unfinished saves; see `Checkpoints.close`."""
        self.checkpoints.close()

    def _restore_with_layout(
        self, checkpoints: Checkpoints, abstract: Callable[[Any], Any], *, partial: bool = False
    ):
        """The newest tree of ``checkpoints`` in the layout of the model, and its position."""

        def as_saved(position: Mapping[str, Any]) -> Any:
            return abstract(_with_layout(self._model, position.get("layout")))

        restored = checkpoints.restore(as_saved, partial=partial)
        if restored is None or restored[1].get("layout") in (None, _layout(self._model)):
            return restored
        tree, position = restored
        target = abstract(self._model)
        layout: Any = _layout(self._model)
        stored = jax.tree.map(lambda a: a.sharding, target)
        return jax.jit(lambda t: rearranged(t, **layout), out_shardings=stored)(tree), position


def _layout(model: Any) -> dict[str, Any] | None:
    """The layout of the layers of ``model``: fields of `DecoderConfig`."""
    if not isinstance(model, DecoderConfig):
        return None
    return {"scan": model.scan, "circuits": model.circuits}


def _with_layout(model: Any, layout: Mapping[str, Any] | None) -> Any:
    return model if layout is None else dataclasses.replace(model, **layout)
