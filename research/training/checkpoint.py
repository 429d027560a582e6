"""Checkpoints: model, moments, step, key and data position, in one atomic Orbax save.

Arrays are saved under their path in the state, so a checkpoint outlives a change of class, and are
restored straight into the sharding asked for, whatever mesh wrote them.
"""

import functools
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from layers.config import ConfigError
from research.training.disk import writing

Tree = TypeVar("Tree")
_WRITE = "async_serialize"  # how the names of Orbax's coroutines that write arrays begin


class Checkpoints:
    """The checkpoints of one run: the newest ``keep``, and the one with the lowest held-out loss.

    Saving is asynchronous: the arrays are copied and written while training goes on; a save that
    did not finish leaves no checkpoint behind.
    """

    def __init__(self, directory: Path, keep: int):
        # Orbax reports each finished save as a warning, and a failed one as several tracebacks
        # before it raises; a write that it gave up with it is told by asyncio once more
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").addFilter(_is_not_a_write)
        # and by Python, whose loop is closed when TensorStore comes back to it
        if getattr(sys.unraisablehook, "func", None) is not _of_others:
            sys.unraisablehook = functools.partial(_of_others, sys.unraisablehook)
        self.directory = directory.absolute()
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_goodness,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                # not consulted beside a policy, but without it Orbax writes no metrics, and a
                # resumed run would not know which of its checkpoints was the best
                best_fn=_goodness,
                create=True,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: Any, position: Mapping[str, Any], loss: float | None) -> None:
        """Begin to save; ``position`` is JSON: where the data iterator and the metrics stand.

        Raises:
          WriteError: this save could not begin, or the one before could not be written.
        """
        if step in self._manager.all_steps():
            return
        with writing(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flatten(state)),
                    position=ocp.args.JsonSave(dict(position)),
                ),
                metrics=None if loss is None else {"loss": loss},
            )

    def restore(
        self, abstract: Callable[[Mapping[str, Any]], Tree]
    ) -> tuple[Tree, dict[str, Any]] | None:
        """The newest readable checkpoint as ``(state, position)``, or None if there is none at all.

        ``abstract(position)`` holds shapes, dtypes and shardings of the state. A checkpoint that
        cannot be read is passed over with a warning, and moved aside once an older one could be.

        Raises:
          ConfigError: there are checkpoints but none can be read, or the newest one holds another
            model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        unreadable = []
        for step in steps:
            wanted: dict[str, Any] = {}
            try:
                position = self._read(step, position=ocp.args.JsonRestore())
                tree = abstract(position)
                wanted = _flatten(tree)
                found = self._read(step, state=ocp.args.StandardRestore(wanted))
            except ConfigError:
                raise
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own
                self._refuse_another_model(step, wanted)
                reason = str(error).strip().splitlines()[0][:200]
                warnings.warn(
                    f"checkpoint {self.directory.name}/{step} cannot be read "
                    f"({type(error).__name__}: {reason})",
                    stacklevel=2,
                )
                unreadable.append(step)
                continue
            # Only now: were all moved away, the next start would find none and begin anew.
            self._set_aside(unreadable)
            leaves = [found[name] for name in wanted]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves), position
        if steps:
            raise ConfigError(
                f"workdir={str(self.directory.parent)!r}: none of its checkpoints can be read"
            )
        return None

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint."""
        [name] = item
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def close(self) -> None:
        """Wait for saves under way.

        Raises:
          WriteError: the last one could not be written.
        """
        with writing(self.directory):
            self._manager.close()

    def _refuse_another_model(self, step: int, wanted: Mapping[str, Any]) -> None:
        try:
            held = self._manager.item_metadata(step)["state"].tree
        except Exception:  # unreadable even there: damaged, which the caller deals with
            return
        for name, array in wanted.items():
            shape = getattr(held.get(name), "shape", None)
            if shape is None or tuple(shape) != tuple(array.shape):
                raise ConfigError(
                    f"checkpoint {step}: {name} has shape {shape}, the model's is {array.shape}"
                )

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self.directory.with_name("unreadable")
            aside.mkdir(exist_ok=True)
            for step in steps:
                place = aside / str(step)
                number = 0
                while place.exists():
                    number += 1
                    place = aside / f"{step}-{number}"
                shutil.move(self.directory / str(step), place)
        multihost_utils.sync_global_devices("unreadable checkpoints are set aside")
        self._manager.reload()


class _Manager(ocp.CheckpointManager):
    """Orbax's, which could not be made where a checkpoint's metrics are damaged."""

    def metrics(self, step: int) -> Any:
        try:
            return super().metrics(step)
        except Exception:  # JSON's, mostly; `restore` deals with the checkpoint
            return None


def _goodness(metrics: Mapping[str, float]) -> float:
    return -metrics.get("loss", float("inf"))


def _of_others(hook: Callable[[Any], Any], report: Any, name: str = _WRITE) -> None:
    # all of a closed loop, whose it is Python does not say; `name`, for at the interpreter's end
    # there is no `_WRITE` any more
    hanging = name in getattr(report.object, "__qualname__", "")
    if not hanging and str(report.exc_value) != "Event loop is closed":
        hook(report)


def _is_not_a_write(record: logging.LogRecord) -> bool:
    return _WRITE not in record.getMessage()


def _flatten(tree: Any) -> dict[str, Any]:
    """Path → leaf; random keys as the numbers they hold."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
