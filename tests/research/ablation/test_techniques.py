"""The README's table of techniques: of files and records made for it, and of our own."""

import re
from pathlib import Path

import pytest

from research.ablation import discover, load
from research.ablation.techniques import BEGIN, END, with_table

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path):
    files = {
        "layers/wide.py": "import jax\nfrom pallas_kernels.widen import widen\n"
        "from pallas_kernels.dispatch import check\n",
        "pallas_kernels/dispatch.py": "",
        "pallas_kernels/widen/__init__.py": "",
        "tests/layers/test_wide.py": 'torch = pytest.importorskip("torch")\n',
        "tests/pallas_kernels/test_widen1.py": "x = np.float64(1)\n",
        "tests/pallas_kernels/test_widen2.py": "import transformers.models.llama\n",
        "tests/pallas_kernels/test_other.py": "import rwkv\n",
        "pallas_kernels/shrink/__init__.py": "",
        "pallas_kernels/shrink/xla.py": "",
        "pallas_kernels/turn/__init__.py": "",
        "tests/pallas_kernels/test_shrink.py": "",
        "tests/research/packing/test_small.py": "",
        "tests/pallas_kernels/shrink/test_xla.py": "",
        "research/packing/__init__.py": "from research.packing.small import pack\n",
        "research/packing/small.py": "import pallas_kernels.shrink.xla\n",
        "layers/outer.py": "from layers.wide import f\nfrom layers import absent\n",
        "tests/layers/test_outer.py": "",
        "research/helper.py": "from pallas_kernels import dispatch, turn\n",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_code_kernels_oracles_and_verdicts(checkout, make_package, monkeypatch):
    experiment = load("branch/wide", make_package())
    monkeypatch.setattr(experiment.module, "CODE", ("layers/wide.py",))
    statuses = ("supported", "not supported", "supported")
    claims = [dict(status=s) for s in statuses]
    record = dict(experiment="branch/wide", scale="cpu", seconds=200.0, claims=claims)
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    text = with_table(readme, checkout, [experiment], [record])
    row = (
        "| [branch/wide](experiments/branch/wide.py) | [wide](layers/wide.py) | "
        "[widen](pallas_kernels/widen/__init__.py) | float64 NumPy, torch, transformers | "
        "cpu: 2 supported, 1 not supported | cpu, 3 min |"
    )
    assert row in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert with_table(text, checkout, [experiment], [record]) == text
    assert "| 3 not run | none |" in with_table(readme, checkout, [experiment], [])
    assert with_table("no marks", checkout, [experiment], []) == "no marks"


@pytest.mark.parametrize(
    "code, imports, kernels",
    [
        ("research/packing/small.py", "", ["shrink"]),
        ("pallas_kernels/shrink/xla.py", "", ["shrink"]),
        ("layers/outer.py", "", ["widen"]),
        ("layers/wide.py", "from research.helper import measure", ["widen", "turn"]),
        ("layers/wide.py", "import research.helper", ["widen", "turn"]),
        ("layers/wide.py", "from research.packing import pack", ["widen", "shrink"]),
        ("layers/wide.py", "from research.packing import small, absent", ["widen", "shrink"]),
        ("layers/wide.py", "from research.elsewhere import x\nimport jax", ["widen"]),
    ],
)
def test_kernels_that_code_and_helpers_use(
    checkout, make_package, monkeypatch, code, imports, kernels
):
    experiment = load("branch/wide", make_package())
    own = checkout / "wide.py"
    own.write_text(imports)
    monkeypatch.setattr(experiment.module, "__file__", str(own))
    monkeypatch.setattr(experiment.module, "CODE", (code,))
    text = with_table(f"{BEGIN}{END}", checkout, [experiment], [])
    cell = text.split("|")[-5]
    assert re.findall(r"\[(\w+)\]", cell) == kernels


@pytest.mark.parametrize("name", discover())
def test_every_experiments_code_is_there(name):
    for path in load(name).code:
        assert (ROOT / path).is_file(), path
