"""Every configuration of the house checks the types of its fields, however it is built."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

from layers.config import ConfigError
from research.data import DataConfig
from research.parallel.mesh import MeshConfig
from research.training import OptimizerConfig, TrainingConfig

ROOT = Path(__file__).parents[1]


def configurations() -> list:
    """The dataclasses whose ``__post_init__`` checks fields, and all that are named ``…Config``."""
    found = []
    for folder in ("layers", "research"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if not isinstance(node, ast.ClassDef) or "Protocol" in ast.unparse(node):
                    continue
                if node.name.endswith("Config") or "check_types(self)" in ast.unparse(node):
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                    found.append(pytest.param(module, node.name, id=node.name))
    return found


@pytest.mark.parametrize(("module", "name"), configurations())
def test_each_configuration_checks_its_types(module, name):
    cls = getattr(importlib.import_module(module), name)
    fields = [field.name for field in dataclasses.fields(cls)]
    with pytest.raises(ConfigError, match=f"^{fields[0]}=<object .*>: must be "):
        cls(**dict.fromkeys(fields, object()))


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (TrainingConfig, dict(steps="10"), "steps='10': must be of type int, not str"),
        (TrainingConfig, dict(steps=10.5), "steps=10.5: must be of type int, not float"),
        (TrainingConfig, dict(steps=2**31), f"steps={2**31}: must be < 2**31"),
        (TrainingConfig, dict(steps=10**30), f"steps={10**30}: must be an integer of at most 64"),
        (
            TrainingConfig,
            dict(steps=1, optimizer=None),
            "optimizer=None: must be a mapping of fields",
        ),
        (OptimizerConfig, dict(learning_rate=1e999), "learning_rate=inf: must be a finite numbe"),
        (OptimizerConfig, dict(clip_norm="1"), "clip_norm='1': must be of type float, not str"),
        (DataConfig, dict(batch_size=2.5), "batch_size=2.5: must be of type int, not float"),
        (DataConfig, dict(paths="a.txt"), "paths='a.txt': must be a list"),
        (MeshConfig, dict(zero=True), "zero=True: must be of type int, not bool"),
    ],
)
def test_a_wrong_type_is_one_line_that_names_the_field(cls, fields, message):
    with pytest.raises(ConfigError) as raised:
        cls(**fields)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
