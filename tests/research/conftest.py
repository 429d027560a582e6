"""Stand-ins: a tiny experiment package (NumPy only, instantaneous) and a machine description."""

import importlib
import itertools
import sys

import pytest

SOURCE = '''"""Wide beats narrow: a stand-in (Nobody 2020)."""
import json, os
from pathlib import Path
import numpy as np
from ml_collections import ConfigDict
from research.ablation import Arm, Claim, difference, mean

PAPER = "Nobody 2020, <Wide> & narrow, arXiv:0000.00000"
CODE = (__name__.replace(".", "/") + ".py",)
MATCHED = "steps"
SEEDS = (0, 1, 2)

def get_config(scale):
    config = ConfigDict(dict(steps=3, noise=0.01, model=dict(width=4, window=None)))
    config.model.name = "plain"
    return config

ARMS = (
    Arm("narrow"),
    Arm("wide", {"model.width": lambda config: 2 * config.model.width}),
    Arm("tuned", {"steps": 5}, after=("wide",)),
)
CLAIMS = (
    Claim("better", "Wide has a lower loss", "Table 1: 2 | 1", difference("loss", "wide", "narrow"),
          "<", 0.0),
    Claim("bytes", "Wide holds at most 64 bytes", "", mean("bytes", "wide"), "<", 64,
          deterministic=True),
    Claim("tuning", "Tuning helps by more than 1", "none", difference("loss", "tuned", "wide"),
          "<", -1.0),
)

def run(unit):
    config = unit.config
    marker = unit.workdir / "step"
    first = int(marker.read_text()) if marker.exists() else 0
    with open(unit.workdir.parent.parent / "log", "a") as log:
        log.write(f"{unit.arm} {unit.seed} from {first}\\n")
    for step in range(first, config.steps):
        unit.progress(step + 1, config.steps, {"loss": 1.0, "tokens_per_second": 10.0})
        marker.write_text(str(step + 1))
        trap = os.environ.get("FAKE_TRAP", "")
        if trap == f"{unit.arm}/{unit.seed}/{step}/interrupt":
            raise KeyboardInterrupt
        if trap == f"{unit.arm}/{unit.seed}/{step}/fail":
            raise RuntimeError("lost\\nmore")
    source = {}
    if unit.after:
        source = json.loads((unit.after["wide"] / "result.json").read_text())["metrics"]
    noise = np.random.default_rng(unit.seed).normal() * config.noise
    loss = 10 / config.model.width + noise * (1 + len(source)) - 0.1 * len(source)
    return {"loss": loss, "bytes": 8 * config.model.width, "curve": [1.0, loss]}
'''

_COUNT = itertools.count()


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Makes an importable package with branch/wide.py and the sources given; returns its name."""

    def make(**sources):
        name = f"fake_experiments_{next(_COUNT)}"
        branch = tmp_path / name / "branch"
        branch.mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
        (branch / "__init__.py").write_text("")
        for stem, source in {"wide": SOURCE, **sources}.items():
            (branch / f"{stem}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.path_importer_cache.clear()
        return name

    return make


@pytest.fixture
def machine(monkeypatch):
    """A fixed description of the machine in place of the real one."""
    module = importlib.import_module("research.training.environment")
    fixed = {"device": "pocket calculator", "commit": "0" * 40}
    monkeypatch.setattr(module, "environment", lambda: fixed)
