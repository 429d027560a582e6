"""The configuration and the model of a run in its workdir, read or written."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from layers.config import EXECUTION, ConfigError, check, decides, from_mapping
from layers.decoder import Decoder, DecoderConfig
from research.data import DataConfig, fingerprint
from research.files import read_json, write_text
from research.models.companions import ORIGIN, write_companions
from research.parallel import MeshConfig, make_mesh, shardings
from research.parallel.rules import with_shardings
from research.training import trainable
from research.training.checkpoint import Checkpoints
from research.training.config import TrainingConfig
from research.training.environment import environment
from research.training.optimizers import make_optimizer
from research.training.saved import SavedState
from research.training.state import TrainState, abstract_state


def load_model(workdir: Path | str, mesh: MeshConfig = MeshConfig(), *, model: Any = None) -> Any:
    """The model of the newest checkpoint in ``workdir``, written by `train` or `save_model`.

    Args:
      model: its configuration; None: the `DecoderConfig` in ``workdir``. Execution-only fields,
        e.g. ``scan``, may differ from those of the run.

    Raises:
      ConfigError: ``workdir`` is not that of a run, or has no readable checkpoint.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    check(path.exists(), "workdir", str(workdir), "holds no config.json of a run")
    configuration = read_json(path)
    is_run = isinstance(configuration, dict) and "model" in configuration
    check(is_run, "workdir", str(workdir), "its config.json is not that of a run")
    config = (
        from_mapping(DecoderConfig, configuration["model"], "model") if model is None else model
    )
    if "training" not in configuration:
        return _load_saved_model(workdir, config, mesh)
    training = from_mapping(TrainingConfig, configuration["training"], "training")
    patterns = tuple(configuration.get("trainable", trainable.ALL))

    def abstract(config: Any) -> TrainState:
        optimizer = make_optimizer(training.optimizer, training.steps)
        stage = mesh.zero_stage
        return abstract_state(config, optimizer, make_mesh(mesh), stage, patterns=patterns)

    saved = SavedState(workdir, training.keep, config, abstract, patterns)
    try:
        restored = saved.restore()
    finally:
        saved.close()
    if restored is None:
        raise ConfigError(f"workdir={str(workdir)!r}: holds no checkpoint")
    return restored[0].model


def _load_saved_model(workdir: Path, config: DecoderConfig, mesh: MeshConfig) -> Decoder:
    """The model that `save_model` wrote."""
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    target = {"model": with_shardings(abstract, shardings(abstract, make_mesh(mesh)))}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    try:
        restored = checkpoints.restore(lambda position: target)
    finally:
        checkpoints.close()
    if restored is None:
        raise ConfigError(f"workdir={str(workdir)!r}: holds no checkpoint")
    return restored[0]["model"]


def save_model(model: Decoder, workdir: Path) -> None:
    """Write ``model`` to ``workdir``, which must be new, as its only checkpoint."""
    _write(workdir / "config.json", {"model": dataclasses.asdict(model.config)})
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    try:
        checkpoints.save(0, {"model": model}, {}, loss=None)
    finally:
        checkpoints.close()


def begin(
    workdir: Path,
    configuration: Mapping[str, Any],
    seed: int,
    lead: bool,
    patterns: tuple[str, ...] = trainable.ALL,
) -> None:
    """Write the configuration of the run, or raise if the workdir is that of another run.

    ``configuration``: dataclasses by name; None for those that are not used. The mesh and
    `EXECUTION` fields may change from one start to the next; fields that change the numbers may
    not.
    """
    may_change = (
        "mesh.",
        *(f"model.{name}" for name in decides(configuration["model"], EXECUTION)),
    )
    described: dict[str, Any] = {
        name: _described(part) for name, part in configuration.items() if part is not None
    }
    if patterns != trainable.ALL:
        described["trainable"] = patterns
    described = json.loads(json.dumps({**described, "seed": seed}))
    path = workdir / "config.json"
    if path.exists():
        previous = read_json(path)
        for field, old, new in differences(previous, described):
            if not field.startswith(may_change):
                raise ConfigError(
                    f"{field}={new!r}: workdir {str(workdir)!r} was begun with {old!r}"
                )
        return
    if not lead:
        return
    try:
        _write(workdir / "environment.json", environment())
        if configuration["data"] is not None:
            _write(workdir / "data.json", fingerprint(configuration["data"]))
            if configuration["data"].source != "synthetic":
                write_companions(configuration["data"], workdir / ORIGIN)
        _write(path, described)
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r}: cannot be written: {error.strerror}"
        ) from None


def differences(previous: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted field, previous and new value of what differs between two nested dicts."""
    if isinstance(previous, dict) and isinstance(new, dict):
        for name in {**new, **previous}:
            field = f"{path}.{name}" if path else name
            yield from differences(previous.get(name), new.get(name), field)
    elif previous != new:
        yield path, previous, new


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _described(part: Any) -> dict[str, Any]:
    """The fields of ``part``; also the name of its class if it is not one of the standard ones."""
    known = isinstance(part, (DecoderConfig, DataConfig, TrainingConfig, MeshConfig))
    return dataclasses.asdict(part) | ({} if known else {"class": type(part).__name__})
