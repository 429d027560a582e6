"""Experiment: what one file under ``experiments/`` declares, checked when it is loaded."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from layers.config import ConfigError, check, check_choice, from_mapping
from pallas_kernels.names import suggest
from research.ablation.claims import Claim
from research.ablation.overrides import assign, assign_text
from research.data import DataConfig, vocabulary_size

SCALES = ("smoke", "cpu", "gpu", "paper")
_REQUIRED = ("PAPER", "CODE", "MATCHED", "SEEDS", "ARMS", "CLAIMS", "get_config")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: the experiment's configuration with some fields changed.

    Attributes:
      name: also the name of its folder.
      overrides: dotted field → value, or a function of the experiment's configuration (without any
        arm's overrides) that gives the value.
      after: arms declared earlier; this arm starts from their finished units of the same seed.
      run: a function of a unit, used in place of the experiment's ``run``.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    run: "Callable[[Unit], Mapping[str, Any]] | None" = None

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"arm={self.name!r}: must be letters, digits, '_', '-' and '.'")
        names = isinstance(self.after, tuple) and all(isinstance(a, str) for a in self.after)
        check(names, f"arm {self.name!r}: after", self.after, 'must be a tuple of names: ("mha",)')
        function = self.run is None or callable(self.run)
        check(function, f"arm {self.name!r}: run", self.run, "must be a function of a unit")


def silent(step: int, total: int, metrics: Mapping[str, float]) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Unit:
    """One arm at one seed: the smallest thing that is run, finished or resumed.

    Attributes:
      config: the configuration with the arm's overrides applied, locked.
      arm: the arm's name.
      workdir: the unit's folder; a resumed unit has the same folder.
      after: arm → the folder of its finished unit of the same seed, for each arm that this one
        starts from.
      progress: ``progress(step, total, metrics)``; call it as often as is convenient. It shows
        ``loss`` and ``tokens_per_second`` if the metrics have them.
      profile: steps to trace, ``(first, end)`` as `research.training.train` takes them, or None.
      accept_changed_data: continue although the data changed, see `research.training.train`.
    """

    config: Any  # a locked ConfigDict; type checkers cannot see its fields
    arm: str
    seed: int
    workdir: Path
    after: Mapping[str, Path] = field(default_factory=dict)
    progress: Callable[[int, int, Mapping[str, float]], None] = silent
    profile: tuple[int, int] | None = None
    accept_changed_data: bool = False


@dataclass(frozen=True)
class Experiment:
    """A loaded experiment file; ``name`` is its path under the package, e.g. architecture/gqa."""

    name: str
    module: ModuleType

    @property
    def paper(self) -> str:
        return self.module.PAPER

    @property
    def code(self) -> tuple[str, ...]:
        """Files that hold the technique, as paths from the repository's root."""
        return tuple(self.module.CODE)

    @property
    def matched(self) -> str:
        return self.module.MATCHED

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.module.SEEDS)

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(self.module.ARMS)

    @property
    def claims(self) -> tuple[Claim, ...]:
        return tuple(self.module.CLAIMS)

    @property
    def title(self) -> str:
        """The first line of the file's docstring."""
        return (self.module.__doc__ or "").strip().splitlines()[0]

    def run(self, unit: Unit) -> Mapping[str, Any]:
        """Run ``unit`` with its arm's ``run`` or the file's; its metrics."""
        return (self.arm(unit.arm).run or self.module.run)(unit)

    def check(self, unit: Unit) -> None:
        """Raise `ConfigError` if ``unit`` cannot run here; only files with a ``check`` know it."""
        checked = getattr(self.module, "check", None)
        if checked is not None:
            checked(unit)

    def arm(self, name: str) -> Arm:
        """The arm called ``name``; for an unknown name `ConfigError` suggests the nearest."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ConfigError(f"arm={name!r}: {suggest(name, (a.name for a in self.arms))}")

    def config(self, scale: str, overrides: Sequence[str] = ()) -> ConfigDict:
        """The locked configuration at ``scale`` with ``field=value`` texts applied.

        A ``model.vocab_size`` of None becomes the vocabulary of ``data``.
        """
        check_choice("scale", scale, SCALES)
        config = self.module.get_config(scale).lock()
        for text in overrides:
            assign_text(config, text)
        return _with_vocabulary(config)

    def arm_config(self, config: ConfigDict, arm: Arm) -> ConfigDict:
        """A copy of ``config`` with the overrides of ``arm``, which replace its values.

        An arm with another tokenizer sets ``model.vocab_size``, for example to None (see `config`).
        """
        changed = config.copy_and_resolve_references().lock()
        for name, value in arm.overrides.items():
            try:
                assign(changed, name, value(config) if callable(value) else value)
            except ConfigError as error:
                raise ConfigError(f"{self.name}: arm {arm.name!r}: {error}") from None
            except (TypeError, ArithmeticError) as error:  # of the function, for an odd value
                raise ConfigError(f"{self.name}: arm {arm.name!r}: {name}: {error}") from None
        return _with_vocabulary(changed)


def _with_vocabulary(config: ConfigDict) -> ConfigDict:
    """``config``, whose ``model.vocab_size`` is set to the vocabulary of ``data`` if it is None."""
    model: Any = config.get("model")
    data: Any = config.get("data")
    if isinstance(model, ConfigDict) and model.get("vocab_size", 0) is None and data is not None:
        model.vocab_size = vocabulary_size(from_mapping(DataConfig, data, "data"))
    return config


def folders(package: str) -> list[Path]:
    """The folders of ``package``, found by its name without running any of its code.

    Raises:
      ConfigError: there is no such package.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"package={package!r}: no such package")
    return [Path(location) for location in spec.submodule_search_locations]


def discover(package: str = "experiments") -> list[str]:
    """Names of all experiment files below ``package``, sorted, without importing any of them."""
    names = []
    for root in folders(package):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if not any(part.startswith(("_", ".")) for part in parts):
                names.append("/".join(parts))
    return sorted(names)


def load(name: str, package: str = "experiments") -> Experiment:
    """Import the experiment ``name`` and check its declarations.

    Raises:
      ConfigError: an unknown name (the nearest one is suggested), or a declaration that is missing
        or invalid; the message names the file.
    """
    known = discover(package)
    if name not in known:
        stems = [full for full in known if full.split("/")[-1] == name]
        raise ConfigError(f"experiment={name!r}: {suggest(stems[0] if stems else name, known)}")
    module = importlib.import_module(f"{package}.{name.replace('/', '.')}")
    path = f"{package}/{name}.py"
    missing = [entry for entry in _REQUIRED if not hasattr(module, entry)]
    if not (module.__doc__ or "").strip():
        missing.insert(0, "a docstring")
    if missing:
        raise ConfigError(f"{path}: missing {', '.join(missing)}")
    _validate(path, module)
    root = folders(package)[0].parent
    for file in module.CODE:
        check((root / file).is_file(), f"{path}: CODE", file, "no such file")
    return Experiment(name, module)


def _validate(path: str, module: ModuleType) -> None:
    def require(condition, message):
        if not condition:
            raise ConfigError(f"{path}: {message}")

    for entry in ("PAPER", "MATCHED"):
        require(isinstance(getattr(module, entry), str), f"{entry} must be text")
        require(getattr(module, entry).strip(), f"{entry} is empty")
    require(callable(module.get_config), "get_config must be a function")
    for entry in ("plan_step", "check"):
        optional = getattr(module, entry, None)
        require(optional is None or callable(optional), f"{entry} must be a function")
    for entry, kind in (("SEEDS", int), ("ARMS", Arm), ("CLAIMS", Claim), ("CODE", str)):
        values = getattr(module, entry)
        require(isinstance(values, (tuple, list)), f"{entry} must be a tuple of {kind.__name__}")
        require(len(values) > 0, f"{entry} is empty")
        for value in values:
            require(isinstance(value, kind), f"{entry} holds {value!r}, not {kind.__name__}")
        labels = [getattr(value, "name", value) for value in values]
        require(len(set(labels)) == len(labels), f"{entry} has a name twice: {labels}")
    require(min(module.SEEDS) >= 0, f"SEEDS={module.SEEDS}: must be ≥ 0")
    if any(arm.run is None for arm in module.ARMS):
        require(hasattr(module, "run"), "missing run")
        require(callable(module.run), "run must be a function")
    _validate_sources(module.ARMS, require)


def _validate_sources(arms: Sequence[Arm], require: Callable[[Any, str], None]) -> None:
    """Check `Arm.after`: it names arms that are declared before the arm itself."""
    names = [arm.name for arm in arms]
    for arm in arms:
        for source in arm.after:
            known = f"no such arm; {suggest(source, names)}"
            require(source in names, f"arm {arm.name!r}: after={source!r}: {known}")
    try:
        TopologicalSorter({arm.name: arm.after for arm in arms}).prepare()
    except CycleError as error:
        require(False, f"ARMS start from one another: {' → '.join(error.args[1])}")
    for number, arm in enumerate(arms):
        for source in arm.after:
            order = "must be an arm declared before it"
            require(source in names[:number], f"arm {arm.name!r}: after={source!r}: {order}")
