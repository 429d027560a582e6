"""A model in a workdir: read from any run's, or written to a new one that has no run yet."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from layers.config import ConfigError, check, from_mapping
from layers.decoder import Decoder, DecoderConfig
from research.parallel import MeshConfig, make_mesh, shardings
from research.parallel.rules import placed
from research.training.checkpoint import Checkpoints
from research.training.config import TrainingConfig
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state


def load_model(workdir: Path | str, mesh: MeshConfig = MeshConfig()) -> Decoder:
    """The model of the newest checkpoint in ``workdir``, as `train` or `save_model` left it.

    Raises:
      ConfigError: ``workdir`` holds no run, or no checkpoint that can be read.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    check(path.exists(), "workdir", str(workdir), "holds no config.json of a run")
    held = json.loads(path.read_text())
    given = isinstance(held, dict) and "model" in held
    check(given, "workdir", str(workdir), "its config.json is not of a run")
    config = from_mapping(DecoderConfig, held["model"], "model")
    if "training" in held:
        training = from_mapping(TrainingConfig, held["training"], "training")
        optimizer = make_optimizer(training.optimizer, training.steps)
        keep = training.keep
        abstract = abstract_state(config, optimizer, make_mesh(mesh), mesh.zero_stage)
    else:
        keep, abstract = 1, _model_alone(config, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep)
    try:
        restored = checkpoints.restore(abstract)
    finally:
        checkpoints.close()
    if restored is None:
        raise ConfigError(f"workdir={str(workdir)!r}: holds no checkpoint")
    state: Any = restored[0]
    return state["model"] if isinstance(state, dict) else state.model


def save_model(model: Decoder, workdir: Path) -> None:
    """Write ``model`` to ``workdir``, which holds nothing yet, as its only checkpoint."""
    workdir.mkdir(parents=True, exist_ok=True)
    described = {"model": dataclasses.asdict(model.config)}
    (workdir / "config.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    try:
        checkpoints.save(0, {"model": model}, {}, loss=None)
    finally:
        checkpoints.close()


def _model_alone(config: DecoderConfig, mesh: MeshConfig) -> dict[str, Decoder]:
    model = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {"model": placed(model, shardings(model, make_mesh(mesh)))}
