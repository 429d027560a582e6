"""The standard subject of an architecture ablation: a small decoder trained on real text.

Experiments share one base configuration per scale and change only the fields that they compare, so
that a difference between two arms is a difference between two techniques.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from layers.attention import AttentionConfig
from layers.config import ConfigError, check, check_choice, from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.ablation.experiment import SCALES, Unit
from research.data import DataConfig, make_dataset, vocabulary_size
from research.files import read_lines
from research.parallel import MeshConfig, make_mesh
from research.training import (
    DataError,
    NextToken,
    Objective,
    Source,
    TrainingConfig,
    TrainResult,
    evaluate,
    load_model,
    train,
)
from research.training.check import check_run
from research.training.profile import check_steps
from research.training.source import Feed, GrainSource

# scale: width, layers, heads, mlp width, sequence length, batch size, steps
_SIZES = {
    "smoke": (32, 2, 4, 64, 32, 4, 6),
    "cpu": (128, 2, 8, 344, 128, 16, 240),
    "gpu": (512, 8, 8, 1376, 1024, 64, 3000),
    "paper": (4096, 32, 32, 11008, 4096, 512, 250_000),
}

# Sinusoids have amplitude 1. Without the factor √d (Vaswani 2017, §3.4) the embeddings would be
# negligible beside them.
SINUSOIDAL = {
    "model.position": "sinusoidal",
    "model.embedding_scale": lambda config: config.model.width**0.5,
}


def language_model(scale: str) -> Any:
    """A `ConfigDict`: ``model``, ``data``, ``training``, ``mesh`` of the decoder at ``scale``.

    The result has every field, so that every field can be overridden. ``model.vocab_size`` is None:
    the vocabulary of the data, whose tokenizer may be overridden too. The text is the standard
    library of the running Python: prose and code that every machine has.
    """
    check_choice("scale", scale, SCALES)
    width, layers, heads, mlp, length, batch, steps = _SIZES[scale]
    accelerator = scale in ("gpu", "paper")
    data = DataConfig(sequence_length=length, batch_size=batch)
    model = DecoderConfig(
        vocab_size=1,  # None below
        width=width,
        num_layers=layers,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads),
        mlp=MlpConfig(width=mlp),
        dtype="bfloat16" if accelerator else "float32",
        # XLA:CPU chooses better layouts for an unrolled stack; a scanned one compiles faster
        scan=scale != "cpu",
        remat="full" if scale == "paper" else "none",
    )
    parts = dict(
        model=model,
        data=data,
        training=TrainingConfig(steps=steps),
        mesh=MeshConfig(data=1, fsdp=-1) if accelerator else MeshConfig(),
    )
    config: Any = ConfigDict({name: dataclasses.asdict(part) for name, part in parts.items()})
    config.model.vocab_size = None  # that of the data, with all overrides: see `Experiment.config`
    training = config.training
    training.optimizer.learning_rate = 6e-4 if accelerator else 3e-3
    training.optimizer.warmup_steps = max(1, steps // 20)
    training.eval_batches = 2 if scale == "smoke" else 16
    training.eval_every = max(1, steps // 4)
    training.checkpoint_every = max(2, steps // 4)
    return config


def check_unit(unit: Unit) -> None:
    """Raise `ConfigError` if the unit's model cannot be trained here on its data.

    It is the ``check`` of an experiment whose units are trained on all devices by `train_unit`.
    """
    model = from_mapping(DecoderConfig, unit.config.model, "model")
    training = from_mapping(TrainingConfig, unit.config.training, "training")
    data, mesh = _data(unit), _mesh(unit)
    check_run(
        model,
        training,
        mesh,
        make_mesh(mesh),
        batch_size=data.batch_size,
        sequence_length=data.sequence_length,
        vocabulary=vocabulary_size(data),
    )
    check_steps(unit.profile, training.steps)
    try:
        Feed(GrainSource(data, unit.seed)).next(1, None)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if training.eval_batches:
        # those of all processes: the share of one may be padding
        batches = itertools.islice(make_dataset(data, "validation"), training.eval_batches)
        labels = any(np.any(batch["weights"]) for batch in batches)
        check(labels, "data", data.source, "its held-out split has no labels")


def train_unit(
    unit: Unit,
    init: Callable[[Decoder], Decoder] | Path | str | None = None,
    devices: Sequence[Any] | None = None,
    *,
    objective: Objective | None = None,
    source: Source | None = None,
    frozen: Any = None,
    trainable: Sequence[str] = ("*",),
) -> TrainResult:
    """Train the unit's model on the unit's data; resume from the newest checkpoint in its workdir.

    ``devices`` are those of the unit's mesh; None means all. ``source`` gives the batches in place
    of the unit's data. The other arguments are those of `research.training.train`.
    """
    return train(
        from_mapping(DecoderConfig, unit.config.model, "model"),
        _data(unit) if source is None else None,
        from_mapping(TrainingConfig, unit.config.training, "training"),
        mesh=_mesh(unit),
        seed=unit.seed,
        workdir=unit.workdir,
        init=init,
        objective=objective,
        source=source,
        frozen=frozen,
        trainable=trainable,
        progress=unit.progress,
        profile=unit.profile,
        accept_changed_data=unit.accept_changed_data and source is None,
        devices=devices,
    )


def load_source(unit: Unit, arm: str | None = None) -> Decoder:
    """The final model of ``arm``, an arm that this unit starts from (`Arm.after`).

    ``arm=None`` requires that there is exactly one such arm.

    Raises:
      ConfigError: the unit does not start from ``arm``; or ``arm`` is None and the unit starts from
        no arm or from several.
    """
    if arm is None:
        known = ", ".join(unit.after) or "none"
        check(
            len(unit.after) == 1,
            "arm",
            arm,
            f"must be an arm that {unit.arm} starts from: {known}",
        )
        (arm,) = unit.after
    check_choice("arm", arm, unit.after)
    return load_model(unit.after[arm], _mesh(unit))


def evaluate_unit(
    unit: Unit,
    model: Decoder,
    *,
    tokens: int | None = None,
    length: int | None = None,
    objective: Objective = NextToken(),  # noqa: B008
) -> dict[str, float]:
    """Held-out ``loss`` (nats per token) and ``accuracy`` of ``model`` on the unit's data.

    A mixture of experts also has its `research.training.router_metrics`. About ``tokens`` tokens
    are used (default: as many as in training), in sequences of ``length`` (default: as in
    training). They are the same for every model. ``objective`` computes the loss.
    """
    data = _data(unit)
    length = data.sequence_length if length is None else length
    if tokens is None:
        rows = unit.config.training.eval_batches * data.batch_size
    else:
        rows = max(1, tokens // length)
    batch_size = min(data.batch_size, rows)
    data = dataclasses.replace(data, sequence_length=length, batch_size=batch_size)
    mesh = make_mesh(_mesh(unit))
    metrics = evaluate(model, data, batches=rows // batch_size, mesh=mesh, objective=objective)
    return {
        name: value
        for name, value in metrics.items()
        if name in ("loss", "accuracy") or name.startswith("router_")
    }


def eval_losses(unit: Unit) -> list[float]:
    """Held-out losses during the training of a unit, every ``training.eval_every`` steps."""
    return _logged(unit, "eval_loss")


def train_losses(unit: Unit) -> list[float]:
    """Losses of the training batches of a unit, every ``training.log_every`` steps."""
    return _logged(unit, "loss")


def _logged(unit: Unit, name: str) -> list[float]:
    path = unit.workdir / "metrics.jsonl"
    rows = read_lines(path, {"step": int}, "delete its folder to run the unit again")
    return [row[name] for row in rows if name in row]


def _mesh(unit: Unit) -> MeshConfig:
    return from_mapping(MeshConfig, unit.config.mesh, "mesh")


def _data(unit: Unit) -> DataConfig:
    return from_mapping(DataConfig, unit.config.data, "data")
