"""What a workdir says of its run, and the model in it: read, or written to a new one."""

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
    """The model of the newest checkpoint in ``workdir``, as `train` or `save_model` left it.

    Args:
      model: its configuration; None: the `DecoderConfig` that ``workdir`` says. Fields that decide
        execution alone may be others, e.g. ``scan``.

    Raises:
      ConfigError: ``workdir`` holds no run, or no checkpoint that can be read.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    check(path.exists(), "workdir", str(workdir), "holds no config.json of a run")
    held = read_json(path)
    given = isinstance(held, dict) and "model" in held
    check(given, "workdir", str(workdir), "its config.json is not of a run")
    config = from_mapping(DecoderConfig, held["model"], "model") if model is None else model
    if "training" not in held:
        return _load_alone(workdir, config, mesh)
    training = from_mapping(TrainingConfig, held["training"], "training")
    patterns = tuple(held.get("trainable", trainable.ALL))

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


def _load_alone(workdir: Path, config: DecoderConfig, mesh: MeshConfig) -> Decoder:
    """What `save_model` wrote."""
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    wanted = {"model": with_shardings(abstract, shardings(abstract, make_mesh(mesh)))}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    try:
        restored = checkpoints.restore(lambda position: wanted)
    finally:
        checkpoints.close()
    if restored is None:
        raise ConfigError(f"workdir={str(workdir)!r}: holds no checkpoint")
    return restored[0]["model"]


def save_model(model: Decoder, workdir: Path) -> None:
    """Write ``model`` to ``workdir``, which holds nothing yet, as its only checkpoint."""
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
    """Write what the run is, or refuse a workdir that holds another one.

    ``configuration``: dataclasses by name, None where there is none. The mesh and what is metadata
    `EXECUTION` may change from one start to the next; whatever decides the numbers may not.
    """
    free = ("mesh.", *(f"model.{name}" for name in decides(configuration["model"], EXECUTION)))
    described: dict[str, Any] = {
        name: _described(part) for name, part in configuration.items() if part is not None
    }
    if patterns != trainable.ALL:
        described["trainable"] = patterns
    described = json.loads(json.dumps({**described, "seed": seed}))
    path = workdir / "config.json"
    if path.exists():
        before = read_json(path)
        for field, was, now in _differences(before, described):
            if not field.startswith(free):
                raise ConfigError(
                    f"{field}={now!r}: workdir {str(workdir)!r} was begun with {was!r}"
                )
        return
    if not lead:
        return
    try:
        _write(workdir / "environment.json", environment())
        if configuration["data"] is not None:
            _write(workdir / "data.json", fingerprint(configuration["data"]))
        _write(path, described)
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r}: cannot be written: {error.strerror}"
        ) from None


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**now, **before}:
            where = f"{path}.{name}" if path else name
            yield from _differences(before.get(name), now.get(name), where)
    elif before != now:
        yield path, before, now


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _described(part: Any) -> dict[str, Any]:
    """The fields of ``part``, and its class where that is no part of every run."""
    known = isinstance(part, (DecoderConfig, DataConfig, TrainingConfig, MeshConfig))
    return dataclasses.asdict(part) | ({} if known else {"class": type(part).__name__})
