import re
from pathlib import Path

import pytest

from layers.config import ConfigError
from research.ablation import Unit, discover, load
from research.ablation.report import results_folder

COMPLETE = '''"""Doc."""
from research.ablation import Arm, Claim, mean
PAPER = MATCHED = "text"
CODE = (__name__.replace(".", "/") + ".py",)
SEEDS = (0,)
ARMS = (Arm("a"),)
CLAIMS = (Claim("c", "s", "p", mean("x", "a"), "<", 0),)
def get_config(scale): ...
def run(unit): ...
'''


def test_discovers_files_without_importing_them(make_package):
    name = make_package(broken="1/0", _private="")
    assert discover(name) == ["branch/broken", "branch/wide"]


def test_real_experiments_are_found():
    assert "architecture/gqa" in discover()


@pytest.mark.parametrize("asked", ["wide", "branch/wyde"])
def test_unknown_name_suggests(make_package, asked):
    with pytest.raises(ConfigError, match="did you mean 'branch/wide'"):
        load(asked, make_package())


@pytest.mark.parametrize(
    "before, after, message",
    [
        ('"""Doc."""', "", "branch/other.py: missing a docstring"),
        ("SEEDS = (0,)\n", "", "missing SEEDS"),
        ("def run(unit): ...", "run = 3", "run must be a function"),
        ("SEEDS = (0,)", "SEEDS = ()", "SEEDS is empty"),
        ("SEEDS = (0,)", "SEEDS = (0, 0)", "SEEDS has a name twice"),
        ('Arm("a"),', 'Arm("a"), Arm("a"),', "ARMS has a name twice"),
        ("def run(unit): ...", "", "branch/other.py: missing run"),
        ('Arm("a")', 'Arm("a", run=3)', "arm 'a': run=3: must be a function of a unit"),
        ('Arm("a")', 'Arm("a", after="b")', "arm 'a': after='b': must be a tuple of names"),
        ('Arm("a")', 'Arm("a", after=("b",))', "arm 'a': after='b': no such arm; known: a"),
        (
            'Arm("a")',
            'Arm("mha"), Arm("a", after=("mha", "mhaa"))',
            "arm 'a': after='mhaa': no such arm; did you mean 'mha'?",
        ),
        (
            'Arm("a")',
            'Arm("a", after=("b",)), Arm("b")',
            "arm 'a': after='b': must be an arm declared before it",
        ),
        ('Arm("a")', 'Arm("a", after=("a",))', "ARMS start from one another: a → a"),
        (
            'Arm("a")',
            'Arm("a", after=("c",)), Arm("b", after=("a",)), Arm("c", after=("b",))',
            "ARMS start from one another: ",
        ),
        ('Arm("a")', '"a"', "ARMS holds 'a', not Arm"),
        ('Arm("a")', 'Arm("../a")', "arm='../a'"),
        (
            'CODE = (__name__.replace(".", "/") + ".py",)',
            'CODE = ("layers/nosuch.py",)',
            "branch/other.py: CODE='layers/nosuch.py': no such file",
        ),
        ('PAPER = MATCHED = "text"', 'PAPER = MATCHED = " "', "PAPER is empty"),
    ],
)
def test_what_is_wrong_is_named(make_package, before, after, message):
    assert before in COMPLETE
    name = make_package(other=COMPLETE.replace(before, after))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("branch/other", name)


def test_a_file_whose_arms_all_run_their_own_way_needs_no_run(make_package):
    source = COMPLETE.replace("def run(unit): ...", "").replace(
        'Arm("a")', 'Arm("a", run=lambda unit: {"x": 3})'
    )
    experiment = load("branch/other", make_package(other=source))
    unit = Unit(experiment.config, "a", 0, Path())
    assert experiment.run(unit) == {"x": 3}


def test_an_arm_that_overrides_an_unknown_field_is_named(make_package):
    experiment = load("branch/wide", make_package())
    arm = type(experiment.arms[0])("odd", {"model.depth": 3})
    with pytest.raises(ConfigError, match="arm 'odd': model.depth: no such field"):
        experiment.arm_config(experiment.config("cpu"), arm)


def test_unknown_scale_and_arm_suggest(make_package):
    experiment = load("branch/wide", make_package())
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        experiment.config("smok")
    with pytest.raises(ConfigError, match="did you mean 'narrow'"):
        experiment.arm("narow")


def test_records_are_in_the_folder_of_the_package_which_is_not_run(make_package, tmp_path):
    name = make_package()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError")
    assert results_folder(name) == tmp_path / name / "results"
    with pytest.raises(ConfigError, match="^package='nowhere': no such package"):
        results_folder("nowhere")
