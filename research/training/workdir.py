"""The configuration and the model of a run in its workdir, read or written."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from layers.config import EXECUTION, ConfigError, check, decides, from_mapping
from layers.decoder import Decoder, DecoderConfig
from research.data import DataConfig, fingerprint, what_changed
from research.files import read_fields, read_json, write_text
from research.memory import check_memory, shard_bytes
from research.models.companions import ORIGIN, write_companions
from research.parallel import MeshConfig, make_mesh, shardings
from research.parallel.rules import with_shardings
from research.training import trainable
from research.training.checkpoint import Checkpoints
from research.training.config import TrainingConfig
from research.training.disk import writing
from research.training.environment import environment
from research.training.optimizers import make_optimizer
from research.training.saved import SavedState
from research.training.state import TrainState, abstract_state

DATA = "data.json"
_PART = {"name": str, "split": str, "bytes": int, "sha256": str}
_CHANGE = {"step": int, "changes": [str]}
# the forms of its fields that are read; only the first is in each
_DATA = {"sha256": str, "bytes": int, "parts": [_PART], "history": [_CHANGE]}


def load_model(
    workdir: Path | str,
    mesh: MeshConfig = MeshConfig(),
    *,
    model: Any = None,
    devices: Sequence | None = None,
) -> Any:
    """The model of the newest checkpoint in ``workdir``, written by `train` or `save_model`.

    Args:
      model: its configuration; None: the `DecoderConfig` in ``workdir``. Execution-only fields,
        e.g. ``scan``, may differ from those of the run.
      devices: of ``mesh``; None: all.

    Raises:
      ConfigError: ``workdir`` is not that of a run, or has no readable checkpoint.
    """
    workdir = Path(workdir)
    configuration = _configuration(workdir)
    config = _decoder_config(configuration) if model is None else model
    if "training" not in configuration:
        return _load_saved_model(workdir, config, make_mesh(mesh, devices))
    training = from_mapping(TrainingConfig, configuration["training"], "training")
    patterns = tuple(configuration.get("trainable", trainable.ALL))

    def abstract(config: Any) -> TrainState:
        optimizer = make_optimizer(training.optimizer, training.steps)
        stage, on = mesh.zero_stage, make_mesh(mesh, devices)
        state = abstract_state(config, optimizer, on, stage, patterns=patterns)
        _check_fits(state.model, on, workdir)  # moments are not read
        return state

    saved = SavedState(workdir, training.keep, config, abstract, patterns)
    try:
        restored = saved.restore_model()
    finally:
        saved.close()
    if restored is None:
        raise ConfigError(f"workdir={str(workdir)!r}: holds no checkpoint")
    return restored


def model_config(workdir: Path | str) -> DecoderConfig:
    """The configuration of the model in ``workdir``, see `load_model`.

    Raises:
      ConfigError: ``workdir`` is not that of a run.
    """
    return _decoder_config(_configuration(Path(workdir)))


def _configuration(workdir: Path) -> dict[str, Any]:
    """The configuration of the run in ``workdir``."""
    path = workdir / "config.json"
    check(path.exists(), "workdir", str(workdir), "holds no config.json of a run")
    configuration = read_json(path)
    is_run = isinstance(configuration, dict) and "model" in configuration
    check(is_run, "workdir", str(workdir), "its config.json is not that of a run")
    return configuration


def _decoder_config(configuration: dict[str, Any]) -> DecoderConfig:
    return from_mapping(DecoderConfig, configuration["model"], "model")


def _load_saved_model(workdir: Path, config: DecoderConfig, mesh: Mesh) -> Decoder:
    """The model that `save_model` wrote."""
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    target = {"model": with_shardings(abstract, shardings(abstract, mesh))}
    _check_fits(target, mesh, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    try:
        restored = checkpoints.restore(lambda position: target, partial=True)
    finally:
        checkpoints.close()
    if restored is None:
        raise ConfigError(f"workdir={str(workdir)!r}: holds no checkpoint")
    return restored[0]["model"]


def _check_fits(tree: Any, mesh: Mesh, workdir: Path) -> None:
    check_memory(shard_bytes(tree), mesh, f"workdir={str(workdir)!r}", "its model")


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
    accept_changed_data: bool = False,
    start: Path | None = None,
) -> list[str]:
    """Write the configuration and the fingerprint of the data, or compare with what is there.

    ``configuration``: dataclasses by name; None for those that are not used. The mesh and
    `EXECUTION` fields may change from one start to the next; fields that change the numbers may
    not. A start that ended before its first metrics and checkpoint decides nothing: the run begins
    again. Float32 parameters have no float32 copy, so for them ``master`` may change.
    ``start``: the workdir of the model that the run starts from.

    Returns:
      What changed in the data (`research.data.what_changed`), if that is accepted, for
      `record_changed_data`.

    Raises:
      ConfigError: the workdir is that of another run, or the data changed and that is not accepted.
    """
    may_change = (
        "mesh.",
        *(f"model.{name}" for name in decides(configuration["model"], EXECUTION)),
    )
    if getattr(configuration["model"], "param_dtype", None) == "float32":
        may_change += ("training.optimizer.master",)
    described: dict[str, Any] = {
        name: _described(part) for name, part in configuration.items() if part is not None
    }
    if patterns != trainable.ALL:
        described["trainable"] = patterns
    described = json.loads(json.dumps({**described, "seed": seed}))
    path, data = workdir / "config.json", configuration["data"]
    remedy = f"delete {str(workdir)!r} to start the run again"
    previous = read_fields(path, dict, remedy) if path.exists() else None
    if previous is not None and not _is_unused(workdir, previous):
        for field, old, new in differences(previous, described):
            if not field.startswith(may_change):
                raise ConfigError(
                    f"{field}={new!r}: workdir {str(workdir)!r} was begun with {old!r}"
                )
        changed = [] if data is None else _changed_data(workdir, data)
        check(
            not changed or accept_changed_data,
            "data.source",
            data and data.source,
            f"must be as when workdir {str(workdir)!r} was begun: {'; '.join(changed)}; "
            "accept_changed_data=True (ablate run --accept-changed-data) continues with it",
        )
        return changed
    if not lead:
        return []
    try:
        if previous not in (None, described):  # its time is not that of this run
            (workdir / "clock.json").unlink(missing_ok=True)
        _write(workdir / "environment.json", environment())
        if data is None:
            (workdir / DATA).unlink(missing_ok=True)
        else:
            _write(workdir / DATA, fingerprint(data))
        origin = workdir / ORIGIN
        if previous is not None and not (data and _is_in(Path(data.tokenizer), origin)):
            shutil.rmtree(origin, ignore_errors=True)  # the tokenizer and the family of that start
        write_companions(data, origin, start and start / ORIGIN)
        _write(path, described)
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r}: cannot be written: {error.strerror}"
        ) from None
    return []


def record_changed_data(workdir: Path, data: DataConfig, step: int, changed: list[str]) -> None:
    """Record that the run in ``workdir`` continues after ``step`` with ``data``, which changed.

    ``data.json`` becomes that of the new data. Its ``history`` lists the steps, what changed and
    the hashes before.
    """
    path = workdir / DATA
    before = _read_data(path) if path.exists() else {}
    hashes = {name: before.get(name) for name in ("sha256", "tokenizer_sha256")}
    entry = {"step": step, "changes": changed, "before": hashes}
    with writing(workdir):
        history = [*before.get("history", []), entry]
        _write(path, {**fingerprint(data), "history": history})
        write_companions(data, workdir / ORIGIN)


def data_record(workdir: Path) -> tuple[Any, dict[str, Any]] | None:
    """The configuration of the data of the run in ``workdir`` and its ``data.json``, if any.

    Raises:
      ConfigError: one of the two files is damaged.
    """
    config, record = workdir / "config.json", workdir / DATA
    if not (config.exists() and record.exists()):
        return None
    remedy = f"delete {str(workdir)!r} to run it again"
    return read_fields(config, dict, remedy).get("data"), _read_data(record)


def _read_data(path: Path) -> dict[str, Any]:
    """The content of the ``data.json`` at ``path``; raises `ConfigError` if it is damaged."""
    remedy = "delete it; accept_changed_data=True (ablate run --accept-changed-data) continues"
    present = {"sha256", *read_fields(path, dict, remedy)}
    return read_fields(path, {name: _DATA[name] for name in _DATA if name in present}, remedy)


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _is_unused(workdir: Path, configuration: Any) -> bool:
    """Whether ``workdir`` is that of a start by `train` that has no metrics and no checkpoint."""
    metrics = workdir / "metrics.jsonl"
    return (
        isinstance(configuration, dict)
        and {"training", "seed"} <= set(configuration)
        and not (metrics.exists() and metrics.stat().st_size)
        and not (workdir / "unreadable").exists()
        and not any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))
    )


def _changed_data(workdir: Path, data: DataConfig) -> list[str]:
    path = workdir / DATA
    if not path.exists():
        return [f"{DATA}, which describes the data, is missing"]
    return what_changed(_read_data(path), fingerprint(data))


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
