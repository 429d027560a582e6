"""The standard subject of an architecture ablation: a small decoder trained on real text.

Experiments share one starting configuration per scale and change what they are about, so that a
difference between two arms is a difference between two techniques.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from layers.attention import AttentionConfig
from layers.config import check, check_choice, from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.ablation.experiment import SCALES, Unit
from research.data import DataConfig, vocabulary_size
from research.files import parse_json
from research.parallel import MeshConfig, make_mesh
from research.training import (
    Objective,
    Source,
    TrainingConfig,
    TrainResult,
    evaluate,
    load_model,
    train,
)

# scale: width, layers, heads, mlp width, sequence length, batch size, steps
_SIZES = {
    "smoke": (32, 2, 4, 64, 32, 4, 6),
    "cpu": (128, 2, 8, 344, 128, 16, 240),
    "gpu": (512, 8, 8, 1376, 1024, 64, 3000),
    "paper": (4096, 32, 32, 11008, 4096, 512, 250_000),
}

# Sinusoids have amplitude 1: without Vaswani's √d (2017, §3.4) they would drown the embeddings.
SINUSOIDAL = {
    "model.position": "sinusoidal",
    "model.embedding_scale": lambda config: config.model.width**0.5,
}


def language_model(scale: str) -> Any:
    """A `ConfigDict`: ``model``, ``data``, ``training``, ``mesh`` of the decoder at ``scale``.

    Every field is in the result, so that every field can be overridden. The text is the running
    Python's standard library: prose and code that every machine has.
    """
    check_choice("scale", scale, SCALES)
    width, layers, heads, mlp, length, batch, steps = _SIZES[scale]
    accelerator = scale in ("gpu", "paper")
    data = DataConfig(sequence_length=length, batch_size=batch)
    model = DecoderConfig(
        vocab_size=vocabulary_size(data),
        width=width,
        num_layers=layers,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads),
        mlp=MlpConfig(width=mlp),
        dtype="bfloat16" if accelerator else "float32",
        # XLA:CPU lays out an unrolled stack better; scanned, it compiles faster
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
    training = config.training
    training.optimizer.learning_rate = 6e-4 if accelerator else 3e-3
    training.optimizer.warmup_steps = max(1, steps // 20)
    training.eval_batches = 2 if scale == "smoke" else 16
    training.eval_every = max(1, steps // 4)
    training.checkpoint_every = max(2, steps // 4)
    return config


def train_unit(
    unit: Unit,
    init: Callable[[Decoder], Decoder] | None = None,
    devices: Sequence[Any] | None = None,
    *,
    objective: Objective | None = None,
    source: Source | None = None,
    frozen: Any = None,
    trainable: Sequence[str] = ("*",),
) -> TrainResult:
    """Train the unit's model on the unit's data, resuming what its workdir holds.

    ``init`` maps the freshly initialised model to the one to start from. ``devices``: of the unit's
    mesh; None is all there are. ``source`` gives the batches in place of the unit's data. The rest
    is as `research.training.train` says.
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
        devices=devices,
    )


def load_source(unit: Unit, arm: str | None = None) -> Decoder:
    """The final model of ``arm``, which this unit starts from (`Arm.after`).

    ``arm`` None: the only one that it starts from.

    Raises:
      ConfigError: the unit starts from no arm of that name, or from none or several.
    """
    if arm is None:
        known = ", ".join(unit.after) or "none"
        check(
            len(unit.after) == 1,
            "arm",
            arm,
            f"must be one of those {unit.arm} starts from: {known}",
        )
        (arm,) = unit.after
    check_choice("arm", arm, unit.after)
    return load_model(unit.after[arm], _mesh(unit))


def evaluate_unit(
    unit: Unit, model: Decoder, *, tokens: int | None = None, length: int | None = None
) -> dict[str, float]:
    """Held-out ``loss`` (nats a token) and ``accuracy`` of ``model`` on the unit's data.

    Of mixtures of experts also their `research.training.router_metrics`. About ``tokens`` tokens
    (default: as in training) in sequences of ``length`` (default: the trained one), the same ones
    for every model.
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
    found = evaluate(model, data, batches=rows // batch_size, mesh=mesh)
    return {
        name: value
        for name, value in found.items()
        if name in ("loss", "accuracy") or name.startswith("router_")
    }


def eval_losses(unit: Unit) -> list[float]:
    """Held-out losses of a trained unit on the way, every ``training.eval_every`` steps."""
    return _logged(unit, "eval_loss")


def train_losses(unit: Unit) -> list[float]:
    """Losses of a trained unit's batches, every ``training.log_every`` steps."""
    return _logged(unit, "loss")


def _logged(unit: Unit, name: str) -> list[float]:
    path = unit.workdir / "metrics.jsonl"
    lines = enumerate(path.read_text().splitlines(), 1)
    rows = (parse_json(line, f"{path}:{number}") for number, line in lines)
    return [row[name] for row in rows if name in row]


def _mesh(unit: Unit) -> MeshConfig:
    return from_mapping(MeshConfig, unit.config.mesh, "mesh")


def _data(unit: Unit) -> DataConfig:
    return from_mapping(DataConfig, unit.config.data, "data")
