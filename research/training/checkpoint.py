"""Checkpoints: model, moments, step, key and data position, in one atomic Orbax save.

Arrays are saved under their path in the state, so that a checkpoint does not depend on the names of
classes. They are restored directly into the requested sharding, whatever mesh saved them.
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
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from layers.config import ConfigError
from research.training.disk import writing

Tree = TypeVar("Tree")
_WRITE = "async_serialize"  # prefix of the names of Orbax's coroutines that write arrays


class Checkpoints:
    """The checkpoints of one run: the newest ``keep``, and the one with the lowest held-out loss.

    Saving is asynchronous: the arrays are copied, and written during training. A save that did not
    finish leaves no checkpoint.
    """

    def __init__(self, directory: Path, keep: int):
        # Orbax logs each finished save as a warning, and a failed one as several tracebacks before
        # it raises; asyncio logs the cancelled write once more
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").addFilter(_is_no_write)
        # and Python reports it when TensorStore calls the event loop, which is closed by then
        if getattr(sys.unraisablehook, "func", None) is not _report_unless_write:
            sys.unraisablehook = functools.partial(_report_unless_write, sys.unraisablehook)
        self.directory = directory.absolute()
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_negative_loss,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                # not used beside a policy, but without it Orbax writes no metrics, and a resumed
                # run could not find its best checkpoint
                best_fn=_negative_loss,
                create=True,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: Any, position: Mapping[str, Any], loss: float | None) -> None:
        """Begin to save; ``position``: state of the data iterator and metrics, in JSON's types.

        Raises:
          WriteError: this save could not begin, or the previous one could not be written.
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
        self, abstract: Callable[[Mapping[str, Any]], Tree], *, partial: bool = False
    ) -> tuple[Tree, dict[str, Any]] | None:
        """The newest readable checkpoint as ``(state, position)``; None if there is none at all.

        ``abstract(position)`` has the shapes, dtypes and shardings of the state. A checkpoint that
        cannot be read is skipped with a warning. It is moved aside after an older one has been
        read. ``partial``: the state is a part of the checkpoint, and arrays may change their dtype.

        Raises:
          ConfigError: no checkpoint can be read, or the newest one is of another state: it has
            other arrays, or arrays of other shapes or dtypes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        unreadable = []
        for step in steps:
            try:
                position = self._restore_item(step, position=ocp.args.JsonRestore())
                tree = abstract(position)
                leaves_by_path = _flatten(tree)
                self._check_same_state(step, leaves_by_path, partial)
                restored = self._restore_arrays(step, leaves_by_path, partial)
            except ConfigError:
                raise
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own
                reason = str(error).strip().splitlines()[0][:200]
                warnings.warn(
                    f"checkpoint {self.directory.name}/{step} cannot be read "
                    f"({type(error).__name__}: {reason})",
                    stacklevel=2,
                )
                unreadable.append(step)
                continue
            # Only now: if all were moved away, the next start would train from the beginning.
            self._move_aside(unreadable)
            leaves = [restored[name] for name in leaves_by_path]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves), position
        if steps:
            raise ConfigError(
                f"workdir={str(self.directory.parent)!r}: none of its checkpoints can be read"
            )
        return None

    def _restore_item(self, step: int, **item: Any) -> Any:
        """Restore one item of a checkpoint."""
        [name] = item
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def _restore_arrays(self, step: int, leaves_by_path: dict[str, Any], partial: bool) -> Any:
        if not partial:
            return self._restore_item(step, state=ocp.args.StandardRestore(leaves_by_path))
        arguments = ocp.args.PyTreeRestore(
            leaves_by_path,
            restore_args=ocp.checkpoint_utils.construct_restore_args(leaves_by_path),
            partial_restore=True,
        )
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(self.directory / str(step) / "state", args=arguments)

    def close(self) -> None:
        """Wait for unfinished saves.

        Raises:
          WriteError: the last save could not be written.
        """
        with writing(self.directory):
            self._manager.close()

    def _check_same_state(
        self, step: int, leaves_by_path: Mapping[str, Any], partial: bool
    ) -> None:
        try:
            saved = self._manager.item_metadata(step)["state"].tree
        except Exception:  # the checkpoint is damaged, which the caller handles
            return
        for name, array in leaves_by_path.items():
            if name not in saved:
                raise ConfigError(f"checkpoint={step}: has no {name}, which the run requires")
            for kind, old, new in (
                ("shape", tuple(saved[name].shape), tuple(array.shape)),
                ("dtype", jnp.dtype(saved[name].dtype), jnp.dtype(array.dtype)),
            ):
                if old != new and not (partial and kind == "dtype"):
                    raise ConfigError(
                        f"checkpoint={step}: {name} has {kind} {old}, the run requires {new}"
                    )
        further = [] if partial else [name for name in saved if name not in leaves_by_path]
        if further:
            raise ConfigError(f"checkpoint={step}: has {further[0]}, which the run does not use")

    def _move_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self.directory.with_name("unreadable")
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / str(step)
                number = 0
                while target.exists():
                    number += 1
                    target = aside / f"{step}-{number}"
                shutil.move(self.directory / str(step), target)
        multihost_utils.sync_global_devices("unreadable checkpoints are set aside")
        self._manager.reload()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which can also be created if the metrics of a checkpoint are damaged."""

    def metrics(self, step: int) -> Any:
        try:
            return super().metrics(step)
        except Exception:  # damaged JSON, mostly; `restore` handles the checkpoint
            return None


def _negative_loss(metrics: Mapping[str, float]) -> float:
    return -metrics.get("loss", float("inf"))


def _report_unless_write(hook: Callable[[Any], Any], report: Any, name: str = _WRITE) -> None:
    # Python does not say which coroutine used the closed loop, so none of these errors is
    # reported; `name` is a parameter because `_WRITE` is deleted when the interpreter exits
    is_write = name in getattr(report.object, "__qualname__", "")
    if not is_write and str(report.exc_value) != "Event loop is closed":
        hook(report)


def _is_no_write(record: logging.LogRecord) -> bool:
    return _WRITE not in record.getMessage()


def _flatten(tree: Any) -> dict[str, Any]:
    """Path → leaf; a random key is a leaf of numbers."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
